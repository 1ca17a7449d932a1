"""finetrainers: one `.pt` a clip and kind, numbered without a gap, moments with a batch of one.

Read by `PrecomputedOnceDataIterable` of finetrainers/data/precomputation.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.export.base import (
    COGVIDEOX,
    LTX,
    T5,
    UMT5,
    WAN,
    Clip,
    Entry,
    Item,
    Target,
    Wants,
    save,
)

FOLDER = "finetrainers-precomputed-data"


class Finetrainers(Target):
    name = "finetrainers"
    about = "a-r-r-o-w/finetrainers: moments and padded embeddings, for --precomputation_reuse"
    numbered = True
    vaes = {
        WAN: Wants(UMT5, ("max_length", "none")),
        COGVIDEOX: Wants(T5, ("max_length",)),
        LTX: Wants(T5, ("max_length",)),
    }

    def items(self, entries: Sequence[Entry]) -> Iterator[Item]:
        for entry in entries:
            yield self.item(f"{FOLDER}/latent-{entry.number}.pt", entry, "latents")
            yield self.item(f"{FOLDER}/condition-{entry.number}.pt", entry, "text")

    def write(self, item: Item, clips: Iterator[Clip], path: Path) -> None:
        (clip,) = clips
        save(self._latents(clip) if "latents" in item.kinds else self._condition(clip), path)

    def _latents(self, clip: Clip) -> dict[str, Any]:
        import torch

        moments = self.latents(clip, clip.moments)[None]
        if self.spec.vae_class == COGVIDEOX:
            return {"latents": moments.transpose(1, 2).contiguous()}  # [B, F, 2C, H, W]
        factor = float(self.spec.constants.get("scaling_factor") or 1.0)
        mean, scale = torch.tensor(self.spec.shift), torch.tensor(self.spec.scale)
        if self.spec.vae_class == WAN:
            # What is called std is 1 / std: it multiplies.
            return {"latents": moments, "latents_mean": mean, "latents_std": scale / factor}
        _, _, frames, height, width = moments.shape
        return {
            "latents": moments,
            "num_frames": frames,
            "height": height,
            "width": width,
            "latents_mean": mean,
            "latents_std": factor / scale,
        }

    def _condition(self, clip: Clip) -> dict[str, Any]:
        import torch

        values = self.text(clip, clip.embedding)
        length = self.index.text.max_length if self.index.text else len(values)
        # Wan's own pipeline fills what it has masked with zeros.
        padded = values.new_zeros(length, values.shape[1])
        padded[: len(values)] = values
        condition: dict[str, Any] = {"encoder_hidden_states": padded[None]}
        if self.spec.vae_class == LTX:
            mask = torch.zeros(1, length, dtype=torch.bool)
            mask[:, : clip.own_tokens] = True
            condition["encoder_attention_mask"] = mask
        return condition
