"""Text encoders of transformers behind one interface: captions in, one embedding per token out.

T5 and umT5 (CogVideoX, LTX, Mochi; Wan) and CLIP's text side (Stable Diffusion). Which class it is
says the folder's config.json.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any, Literal

from manifests.schema import digest
from stages.base import Failed, StageError
from stages.devices import usable
from stages.models import check_weights
from stages.vae.halving import Halving

if TYPE_CHECKING:
    import torch

Padding = Literal["none", "max_length"]

# By the model_type of config.json.
CLASSES = {
    "t5": "T5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "clip_text_model": "CLIPTextModel",
    "clip": "CLIPTextModel",
}
PROJECTING = "CLIPTextModelWithProjection"
NOT_FINITE = (
    "the text encoder gave numbers that are not finite, as T5's do in float16: set embed.dtype to "
    "bfloat16 or float32"
)
_BROKEN = (OSError, ValueError, KeyError, RuntimeError, UnpicklingError)


@dataclass(frozen=True)
class Kind:
    """What a text encoder is, read off its config.json alone."""

    class_name: str
    width: int  # values of a token's embedding
    room: int | None  # the most tokens that it takes; None: no limit of its own

    def check(self, max_length: int) -> None:
        """Raises StageError where it does not take so many tokens."""
        if self.room is not None and max_length > self.room:
            raise StageError(
                f"{self.class_name} takes {self.room} tokens at most: set embed.max_length to "
                f"{self.room}, not {max_length}"
            )


def kind_of(folder: str) -> Kind:
    """Raises StageError where `folder` holds no text encoder that is known here."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StageError(f"{folder} is no text encoder: its config.json can't be read") from error
    kind = str(config.get("model_type"))
    if kind not in CLASSES:
        raise StageError(
            f"{folder} holds a model of type {kind}, which embed does not know: use one of "
            f"{', '.join(CLASSES)}"
        )
    name = PROJECTING if PROJECTING in (config.get("architectures") or ()) else CLASSES[kind]
    inner = config.get("text_config") or {} if kind == "clip" else config
    clip = kind.startswith("clip")
    width = inner.get("hidden_size" if clip else "d_model", 512)  # the classes' own defaults
    return Kind(name, int(width), int(inner.get("max_position_embeddings", 77)) if clip else None)


@dataclass(frozen=True)
class Text:
    """One caption's embedding: `values` of `shape` (tokens, width), row by row, little-endian."""

    values: bytes
    shape: tuple[int, int]
    pooled: bytes | None  # CLIP's one vector for the whole caption
    tokens: int  # of the caption, at most max_length: the rows that are not padding
    truncated: bool


class TextEncoder:
    """A loaded text encoder with its tokenizer. `encode` is the only thing that runs per caption.

    `padding`: "none" gives the encoder a mask, so that an embedding depends on its caption alone,
    and keeps the caption's own tokens; "max_length" pads with the tokenizer's padding token and
    gives no mask, so that all rows are embeddings, as pipelines do whose models were trained so.
    At most `batch` captions go through at once.
    """

    def __init__(
        self,
        folder: str,
        tokenizer: str,
        dtype: str = "float32",
        device: str = "cpu",
        max_length: int = 512,
        padding: Padding = "none",
        batch: int = 16,
    ) -> None:
        """Loads both folders. Raises StageError."""
        import torch
        import transformers
        from safetensors import SafetensorError
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # of loading weights, amid the run's own lines
        self.kind = kind_of(folder)
        self.kind.check(max_length)
        place = usable(device)
        cls = getattr(transformers, self.kind.class_name)
        try:
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(
                tokenizer, local_files_only=True, trust_remote_code=False
            )
            module, loading = cls.from_pretrained(
                folder,
                dtype=getattr(torch, dtype),
                local_files_only=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
            check_weights(module, loading, folder)
            self._module = module.to(place).eval().requires_grad_(False)
        except (*_BROKEN, SafetensorError) as error:
            first = str(error).strip().splitlines()[0]
            raise StageError(f"the text encoder in {folder} can't be loaded: {first}") from error
        pad = self._tokenizer.pad_token_id
        if pad is None and padding == "max_length":
            raise StageError(
                f"the tokenizer in {tokenizer} has no padding token: set padding: none"
            )
        # Told to whoever commits, in another thread: a tokenizer keeps its settings between calls
        # (whether to cut), so no two threads may use it.
        self.empty_tokens = min(len(self._tokenizer("")["input_ids"]), max_length)
        if not self.empty_tokens and padding == "none":
            raise StageError(
                f"the tokenizer in {tokenizer} makes no token of an empty caption, where a text "
                "encoder's own ends each text with one: name that by embed.tokenizer"
            )
        self._pad = int(pad or 0)
        self._dtype: torch.dtype = getattr(torch, dtype)
        self._max_length, self._padding, self._batch = max_length, padding, batch
        self._halving = Halving()
        self.encoded = 0  # captions that went through the encoder

    def encode(self, captions: Sequence[str]) -> list[Text | Failed]:
        """One embedding per caption, in order; each distinct one is encoded once. Failed for a
        caption that the device's memory does not hold, alone, and for one whose embedding is not
        finite."""
        found = dict(self._encode(list(dict.fromkeys(captions))))
        return [found[caption] for caption in captions]

    def _encode(self, captions: Sequence[str]) -> Iterator[tuple[str, Text | Failed]]:
        import torch

        if not captions:
            return
        whole = self._tokenizer(list(captions), add_special_tokens=True)["input_ids"]
        cut = self._tokenizer(
            list(captions), add_special_tokens=True, truncation=True, max_length=self._max_length
        )["input_ids"]
        # Captions of a length together: less padding.
        order = sorted(range(len(captions)), key=lambda i: (len(cut[i]), i))

        def forward(chosen: list[int]) -> Iterable[tuple[torch.Tensor, torch.Tensor | None]]:
            return self._forward([cut[i] for i in chosen])

        self.encoded += len(order)
        for i, result in zip(order, self._halving(forward, order, self._batch), strict=True):
            if isinstance(result, Failed):
                yield captions[i], result
                continue
            values, pooled = result
            if not torch.isfinite(values).all():
                yield captions[i], Failed("not_finite", NOT_FINITE)
                continue
            text = Text(
                raw_bytes(values),
                (values.shape[0], values.shape[1]),
                None if pooled is None else raw_bytes(pooled),
                len(cut[i]),
                len(whole[i]) > len(cut[i]),
            )
            yield captions[i], text

    def _forward(
        self, tokens: Sequence[list[int]]
    ) -> list[tuple[torch.Tensor, torch.Tensor | None]]:
        """Embeddings (tokens, width) and the pooled one, on the CPU, of a batch of token ids."""
        import torch

        masked = self._padding == "none"
        width = max(map(len, tokens)) if masked else self._max_length
        ids = torch.tensor([own + [self._pad] * (width - len(own)) for own in tokens])
        mask = torch.tensor([[1] * len(own) + [0] * (width - len(own)) for own in tokens])
        device = self._module.device
        with torch.inference_mode():
            output = self._module(
                input_ids=ids.to(device), attention_mask=mask.to(device) if masked else None
            )
        states = output.last_hidden_state.to(self._dtype).cpu()
        # Of the class with a projection it is the projected one.
        pooled = getattr(output, "text_embeds", getattr(output, "pooler_output", None))
        pooled = None if pooled is None else pooled.to(self._dtype).cpu()
        return [
            (
                states[i, : len(own)] if masked else states[i],
                None if pooled is None else pooled[i],
            )
            for i, own in enumerate(tokens)
        ]


def key_of(caption: str, encoder: dict[str, Any]) -> str:
    """The name of an embedding by what it was made of: 32 hex digits."""
    return digest(["embedding", caption, encoder], 32)


def raw_bytes(tensor: torch.Tensor) -> bytes:
    """The values in C order, little-endian; numpy has no bfloat16, so they pass as uint8."""
    import torch

    return tensor.contiguous().view(torch.uint8).numpy().tobytes()
