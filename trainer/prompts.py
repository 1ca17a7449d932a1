"""The text of prompts, as the model was trained on captions.

A model of stored embeddings knows no words: its text encoder comes in again for sampling, as the
VAE does, from transformers' own classes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from manifests.shards import TextSpec
from manifests.weights import folder_sha256
from trainer.captions import padded
from trainer.config import ModelConfig, SettingsError
from trainer.models import Text, tokenise
from trainer.posterior import DTYPES

CLASSES = ("T5EncoderModel", "UMT5EncoderModel", "CLIPTextModel", "CLIPTextModelWithProjection")


@torch.inference_mode()
def text_of(
    prompts: Sequence[str],
    config: ModelConfig,
    device: str = "cpu",
    encoder: str | None = None,
    tokenizer: str | None = None,
    exact: bool = False,
) -> Text:
    """What a model of `config` is told of prompts. `encoder` and `tokenizer` are folders, for
    stored embeddings alone; default: as these were made.

    Raises SettingsError where there is no such encoder, or it is another: one of another width,
    or, if `exact`, as for samples while training, with other files.
    """
    if config.embeddings is None:
        return tokenise(prompts, config.text).to(device)
    import transformers  # seconds to import

    spec = TextSpec.from_json(config.embeddings)
    folder = encoder or spec.encoder
    one, other = (
        ("train.samples.text_encoder", "train.samples.tokenizer")
        if exact
        else ("--text-encoder", "--tokenizer")
    )
    if spec.encoder_class not in CLASSES:
        raise SettingsError(f"text encoders of class {spec.encoder_class} are not known here")
    if exact and Path(folder).is_dir():
        sha256 = folder_sha256(Path(folder))
        if sha256 != spec.encoder_sha256:
            raise SettingsError(
                f"{folder} holds another text encoder (sha256 {sha256[:12]}) than the embeddings "
                f"were made with: {spec.encoder} (sha256 {spec.encoder_sha256[:12]}): pass its "
                f"folder as {one}"
            )
    cls = getattr(transformers, spec.encoder_class)
    try:
        words = transformers.AutoTokenizer.from_pretrained(
            tokenizer or folder, local_files_only=True, trust_remote_code=False
        )
        model = cls.from_pretrained(
            folder, dtype=DTYPES[spec.dtype], local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        raise SettingsError(
            f"the text encoder in {folder} can't be loaded: {str(error).splitlines()[0]}; pass the "
            f"folder of {spec.encoder} as {one}, and its tokenizer's as {other}"
        ) from error
    if (width := model.config.hidden_size) != spec.width:
        raise SettingsError(
            f"{folder} gives {width} values a token, but the model was trained on {spec.width}, of "
            f"{spec.encoder}: pass its folder as {one}"
        )
    masked = spec.padding == "none"  # else all tokens are embeddings, padding as well
    made = words(
        list(prompts),
        truncation=True,
        max_length=spec.max_length,
        padding=True if masked else "max_length",
        padding_side="right",
        return_tensors="pt",
    ).to(device)
    mask = made["attention_mask"]
    states = (
        model.to(device)
        .eval()(input_ids=made["input_ids"], attention_mask=mask if masked else None)
        .last_hidden_state
    )
    lengths = mask.sum(1) if masked else torch.full((len(prompts),), states.shape[1])
    values, there = padded([one[: int(n)].cpu() for one, n in zip(states, lengths)])
    return values.to(device), there.to(device)
