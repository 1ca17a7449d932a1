"""CogVideo's own finetune: caches of safetensors beside the videos and their prompts.

Read by `BaseT2VDataset` of finetune/datasets/t2v_dataset.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from pipeline.export.base import (
    COGVIDEOX,
    T5,
    Clip,
    Entry,
    Item,
    Target,
    Wants,
    bring,
    pixels,
    save_tensors,
)
from pipeline.export.cogvideox_factory import video_name, video_path

MODEL = "cogvideox-t2v"


class CogVideo(Target):
    name = "cogvideo"
    about = "THUDM/CogVideo, finetune/: sampled and scaled latents, padded embeddings"
    vaes = {COGVIDEOX: Wants(T5, ("max_length",))}
    one_shape = True
    videos = True

    def accepts(self, entry: Entry) -> str | None:
        return None if entry.line else "without a caption, which its lists can't hold"

    def items(self, entries: Sequence[Entry]) -> Iterator[Item]:
        model = self.options.model or MODEL
        for entry in entries:
            size = "x".join(map(str, pixels(entry.shape, self.spec)))
            folder = f"cache/video_latent/{model}/{size}"
            yield self.item(f"{folder}/{entry.clip_id}.safetensors", entry, "latents")
            yield self.item(f"videos/{video_name(entry)}", entry, "video")
            # One for all clips of a caption: its name is the caption's hash.
            name = hashlib.sha256(entry.line.encode()).hexdigest()
            text = f"cache/prompt_embeddings/{name}.safetensors"
            yield Item(text, ("text",), (entry,), self.layout)

    def write(self, item: Item, clips: Iterator[Clip], path: Path) -> None:
        (clip,) = clips
        if "video" in item.kinds:
            bring(video_path(clip.entry), path, self.options.copy)
        elif "latents" in item.kinds:
            values = self.latents(clip, clip.normalised(clip.sample))
            save_tensors({"encoded_video": values}, path)
        else:
            save_tensors({"prompt_embedding": self.text(clip, clip.embedding)}, path)

    def lists(self, entries: Iterable[Entry]) -> Mapping[str, Iterable[str]]:
        known = list(entries)
        return {
            "prompts.txt": (f"{entry.line}\n" for entry in known),
            "videos.txt": (f"videos/{video_name(entry)}\n" for entry in known),
        }
