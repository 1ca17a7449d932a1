"""Pictures as the data URLs that servers take: JPEG, 4:2:0, of a quality at which nothing that a
caption speaks of is lost."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any

from stages.engines.base import Pictures

QUALITY = 90  # bump the stage's version with it: answers hang on the pixels


@dataclass(frozen=True, slots=True, eq=False)
class DataUrls:
    """Parts of a message, and what stands beside it in the request."""

    parts: tuple[dict[str, Any], ...]
    beside: dict[str, Any]
    nbytes: int


def data_urls(pictures: Pictures) -> DataUrls:
    """Each picture as an `image_url`; a video as one `video_url` of JPEG frames, which is vLLM's
    (`video/jpeg`), with the word that all of them are meant and how far apart they are."""
    frames = [base64.b64encode(jpeg(frame)).decode() for frame in pictures.frames]
    size = sum(map(len, frames))
    if not pictures.video:
        return DataUrls(tuple(_part("image", f"image/jpeg;base64,{f}") for f in frames), {}, size)
    reading = {"num_frames": len(frames), "fps": pictures.fps}
    video = _part("video", f"video/jpeg;base64,{','.join(frames)}")
    return DataUrls((video,), {"media_io_kwargs": {"video": reading}}, size)


def _part(kind: str, data: str) -> dict[str, Any]:
    return {"type": f"{kind}_url", f"{kind}_url": {"url": f"data:{data}"}}


def jpeg(frame: Any) -> bytes:
    """A picture, uint8 RGB [height, width, 3], as a JPEG file."""
    from PIL import Image

    file = io.BytesIO()
    Image.fromarray(frame).save(file, "JPEG", quality=QUALITY)
    return file.getvalue()
