"""cogvideox-factory: a `.pt` a clip and kind beside lists of prompts and videos.

Read by `VideoDataset` of training/dataset.py with `--load_tensors`.
"""

from __future__ import annotations

import json
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
    save,
)


class CogVideoXFactory(Target):
    name = "cogvideox-factory"
    about = "a-r-r-o-w/cogvideox-factory: moments and padded embeddings, for --load_tensors"
    vaes = {COGVIDEOX: Wants(T5, ("max_length",))}
    videos = True

    def accepts(self, entry: Entry) -> str | None:
        return None if entry.line else "without a caption, which its lists can't hold"

    def items(self, entries: Sequence[Entry]) -> Iterator[Item]:
        for entry in entries:
            yield self.item(f"video_latents/{entry.clip_id}.pt", entry, "latents")
            if self.index.facts.get("first_frame"):  # for image-to-video
                yield self.item(f"image_latents/{entry.clip_id}.pt", entry, "first_frame")
            yield self.item(f"prompt_embeds/{entry.clip_id}.pt", entry, "text")
            yield self.item(f"prompts/{entry.clip_id}.txt", entry, "text")
            yield self.item(f"videos/{video_name(entry)}", entry, "video")

    def write(self, item: Item, clips: Iterator[Clip], path: Path) -> None:
        (clip,) = clips
        if item.name.startswith("videos/"):
            bring(video_path(clip.entry), path, self.options.copy)
        elif item.name.endswith(".txt"):
            path.write_text(clip.entry.line + "\n", encoding="utf-8")
        elif "latents" in item.kinds:
            save(self.latents(clip, clip.moments), path)
        elif "first_frame" in item.kinds:
            save(self.latents(clip, clip.first_frame), path)
        else:
            save(self.text(clip, clip.embedding), path)

    def lists(self, entries: Iterable[Entry]) -> Mapping[str, Iterable[str]]:
        known = list(entries)
        rows = ({"prompt": e.line, "video": f"videos/{video_name(e)}"} for e in known)
        return {
            "prompts.txt": (f"{entry.line}\n" for entry in known),
            "videos.txt": (f"videos/{video_name(entry)}\n" for entry in known),
            "data.jsonl": (json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
        }


def video_name(entry: Entry) -> str:
    """By the clip's id, as its latents: a stem without dots."""
    return entry.clip_id + (Path(video_path(entry)).suffix.lower() or ".mp4")


def video_path(entry: Entry) -> str:
    return entry.video.path if entry.video else ""
