"""musubi-tuner: a cache folder of safetensors whose names are their keys.

Read by `VideoDataset.prepare_for_training` and `BucketBatchManager` of musubi_tuner/dataset.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.export.base import (
    HUNYUAN,
    UMT5,
    WAN,
    Clip,
    Entry,
    Item,
    Target,
    Wants,
    pixels,
    save_tensors,
)

if TYPE_CHECKING:
    import torch

FORMAT = "1.0.1"
VIDEOS = "videos.jsonl"
# By VAE: the name in files, and the one in their metadata.
ARCHITECTURES = {WAN: ("wan", "wan"), HUNYUAN: ("hv", "hunyuan_video")}


class Musubi(Target):
    name = "musubi"
    about = "kohya-ss/musubi-tuner: safetensors of Wan (normalised mean) or HunyuanVideo (sampled)"
    vaes = {WAN: Wants(UMT5, ("none",), moments=False), HUNYUAN: Wants(None)}

    def items(self, entries: Sequence[Entry]) -> Iterator[Item]:
        short, _ = ARCHITECTURES[self.spec.vae_class]
        for entry in entries:
            frames, height, width = pixels(entry.shape, self.spec)
            stem = f"{_cache(height, width)}/{entry.clip_id}"
            place = f"00000-{frames:03d}_{width:04d}x{height:04d}"
            yield self.item(f"{stem}_{place}_{short}.safetensors", entry, "latents")
            if self.wants.encoder:
                yield self.item(f"{stem}_{short}_te.safetensors", entry, "text")

    def write(self, item: Item, clips: Iterator[Clip], path: Path) -> None:
        (clip,) = clips
        _, architecture = ARCHITECTURES[self.spec.vae_class]
        known = {"architecture": architecture, "format_version": FORMAT}
        if "text" in item.kinds:
            values = self.text(clip, clip.embedding)
            known["caption1"] = clip.entry.caption
            _save(path, f"varlen_t5_{_name(values)}", values, known)
            return
        hunyuan = self.spec.vae_class == HUNYUAN
        values = self.latents(clip, clip.sample if hunyuan else clip.normalised(clip.mean))
        size = "x".join(map(str, values.shape[1:]))
        frames, height, width = clip.pixels
        known |= {"width": f"{width}", "height": f"{height}", "frame_count": f"{frames}"}
        _save(path, f"latents_{size}_{_name(values)}", values, known)

    def lists(self, entries: Iterable[Entry]) -> Mapping[str, Iterable[str]]:
        """What a dataset has to name. The videos themselves are not opened: their names are keys.

        A dataset for each size: within one, the trainer would stack what it thinks of as equal.
        """
        sizes: dict[tuple[int, int], set[int]] = {}
        for shape in self.shapes():
            frames, height, width = pixels(shape, self.spec)
            sizes.setdefault((height, width), set()).add(frames)
        dataset = ["[general]\nbatch_size = 1\nenable_bucket = true\n"] + [
            f"\n[[datasets]]\nresolution = [{width}, {height}]\n"
            f"video_jsonl_file = {json.dumps(str(self.folder / VIDEOS))}\n"
            f"cache_directory = {json.dumps(str(self.folder / _cache(height, width)))}\n"
            f'target_frames = {sorted(frames)}\nframe_extraction = "head"\n'
            for (height, width), frames in sizes.items()
        ]
        rows = ({"video_path": f"{e.clip_id}.mp4", "caption": e.caption} for e in entries)
        return {
            VIDEOS: (json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
            "dataset.toml": dataset,
        }


def _cache(height: int, width: int) -> str:
    return f"cache/{width}x{height}"


def _name(values: torch.Tensor) -> str:
    return str(values.dtype).removeprefix("torch.")


def _save(path: Path, key: str, values: torch.Tensor, metadata: dict[str, str]) -> None:
    save_tensors({key: values}, path, metadata)
