"""LTX-Video-Trainer: `.precomputed/latents` and `.precomputed/conditions`, a `.pt` a clip each.

Read by `PrecomputedDataset` of ltxv_trainer/datasets.py. Latents are packed, (F x H x W, C): the
reader of LTX-2's trainer unpacks them too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from pipeline.export.base import LTX, T5, Clip, Entry, Item, Target, Wants, save


class Ltx(Target):
    name = "ltx"
    about = "Lightricks/LTX-Video-Trainer: sampled, normalised latents, padded embeddings and mask"
    vaes = {LTX: Wants(T5, ("max_length",))}

    def items(self, entries: Sequence[Entry]) -> Iterator[Item]:
        for entry in entries:
            yield self.item(f".precomputed/latents/{entry.clip_id}.pt", entry, "latents")
            yield self.item(f".precomputed/conditions/{entry.clip_id}.pt", entry, "text")

    def write(self, item: Item, clips: Iterator[Clip], path: Path) -> None:
        import torch

        (clip,) = clips
        if "latents" in item.kinds:
            values = clip.normalised(clip.sample)
            _, frames, height, width = values.shape
            packed = self.latents(clip, values.flatten(1).T)
            shape = {"num_frames": frames, "height": height, "width": width, "fps": clip.fps}
            save({"latents": packed, **shape}, path)
            return
        values = self.text(clip, clip.embedding)
        mask = torch.arange(len(values)) < clip.own_tokens
        save({"prompt_embeds": values, "prompt_attention_mask": mask}, path)
