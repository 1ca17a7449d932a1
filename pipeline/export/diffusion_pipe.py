"""diffusion-pipe: a folder of videos with captions.json. It makes its own latents and caches.

Read by `DirectoryDataset` of utils/dataset.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from pipeline.export.base import Clip, Entry, ExportError, Item, Target, bring
from pipeline.export.cogvideox_factory import video_name, video_path


class DiffusionPipe(Target):
    name = "diffusion-pipe"
    about = "tdrussell/diffusion-pipe: the videos and captions.json; it makes latents itself"
    videos = True
    dtypes = False

    def accepts(self, entry: Entry) -> str | None:
        if entry.video and entry.video.section:
            raise ExportError(
                f"diffusion-pipe opens the videos itself and would see all of the file that clip "
                f"{entry.clip_id} is a section of: cut the clips into files of their own first"
            )
        return None

    def items(self, entries: Sequence[Entry]) -> Iterator[Item]:
        for entry in entries:
            yield self.item(f"clips/{video_name(entry)}", entry, "video")

    def write(self, item: Item, clips: Iterator[Clip], path: Path) -> None:
        (clip,) = clips
        bring(video_path(clip.entry), path, self.options.copy)

    def lists(self, entries: Iterable[Entry]) -> Mapping[str, Iterable[str]]:
        known = {video_name(entry): [entry.caption] for entry in entries}
        return {"clips/captions.json": [json.dumps(known, ensure_ascii=False, indent=1)]}
