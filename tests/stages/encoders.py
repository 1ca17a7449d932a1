"""Tiny text encoders with random weights and tokenizers made on the spot."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

WORDS = "a an the red green blue small large dog cat bird circle square runs sits moves left right"
KINDS = ("t5", "umt5", "clip", "clip_projection")
ROOM = 24  # tokens that the CLIP ones take


def make(folder: Path, kind: str = "t5", width: int = 16, tokenizer: Path | None = None) -> Path:
    """Saves an encoder of `kind` in `folder`, and its tokenizer there or in `tokenizer`."""
    import transformers

    torch.manual_seed(0)
    model: Any
    if kind in ("t5", "umt5"):
        name = {"t5": "T5", "umt5": "UMT5"}[kind]
        config = getattr(transformers, f"{name}Config")(
            vocab_size=64,
            d_model=width,
            d_kv=8,
            d_ff=32,
            num_layers=2,
            num_heads=2,
            # Values that would all be alike tell nothing of what is compared.
            initializer_factor=2.0,
        )
        model = getattr(transformers, f"{name}EncoderModel")(config)
        for name, weight in model.named_parameters():
            if "relative_attention_bias" in name:
                torch.nn.init.normal_(weight)
    else:
        config = transformers.CLIPTextConfig(
            vocab_size=64,
            hidden_size=width,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=ROOM,
            projection_dim=8,
            initializer_range=0.5,
            bos_token_id=2,
            eos_token_id=1,
            pad_token_id=1,
        )
        plain = kind == "clip"
        cls = transformers.CLIPTextModel if plain else transformers.CLIPTextModelWithProjection
        model = cls(config)
    model.eval().save_pretrained(folder)
    _tokenizer(kind).save_pretrained(tokenizer or folder)
    return folder


def _tokenizer(kind: str) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    clip = kind.startswith("clip")
    special = ["<pad>", "</s>", "<s>", "<unk>"]
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS.split()])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    single = "<s> $A </s>" if clip else "$A </s>"
    words.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[(token, vocabulary[token]) for token in special]
    )
    pad = "</s>" if clip else "<pad>"
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        eos_token="</s>",
        bos_token="<s>",
        unk_token="<unk>",
        pad_token=pad,
        padding_side="right",
    )
