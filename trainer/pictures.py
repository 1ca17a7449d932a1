"""Pictures of latents: decoded, put under their prompts, written as GIF, mp4 or PNG."""

from __future__ import annotations

import io
import json
import math
import textwrap
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from manifests.weights import folder_sha256
from trainer.config import SettingsError

if TYPE_CHECKING:
    from numpy.typing import NDArray

FORMATS = (".gif", ".mp4", ".png")
PICTURES = 16  # frames decoded at once
TILE = 192  # pixels: smaller videos are enlarged, so that the prompt above can be read
STRIP, FRAME, GAP = 8, 128, 2  # frames of a video in a PNG, their least width, pixels between them
LETTER, LINE = 7, 15  # pixels of a prompt


def check_vae(
    folder: str, latents: dict[str, Any], option: str = "--vae", exact: bool = False
) -> str:
    """The class of the VAE in `folder`. Raises SettingsError where it is another than the latents
    were made with: of another class, or, if `exact`, with other files."""
    made = f"the latents were made with a {latents['vae_class']}, {latents['vae']}"
    try:
        text = (Path(folder) / "config.json").read_text(encoding="utf-8")
        found = str(json.loads(text).get("_class_name"))
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"{folder} is no VAE of diffusers ({error}); {made}: give its folder as {option}"
        ) from error
    if found != latents["vae_class"]:
        raise SettingsError(f"{folder} holds a {found}, but {made}: give its folder as {option}")
    if exact and (sha256 := folder_sha256(Path(folder))) != latents["vae_sha256"]:
        raise SettingsError(
            f"{folder} holds another {found} (sha256 {sha256[:12]}), but {made} (sha256 "
            f"{latents['vae_sha256'][:12]}): give its folder as {option}"
        )
    return found


def load_vae(folder: str, latents: dict[str, Any], device: str = "cpu") -> torch.nn.Module:
    """The VAE that the latents were made with. Raises SettingsError where `folder` has another."""
    found = check_vae(folder, latents)
    import diffusers  # seconds to import

    vae: torch.nn.Module = getattr(diffusers, found).from_pretrained(folder)
    return vae.to(device).eval()


@torch.inference_mode()
def decode(vae: Any, z: Tensor, latents: dict[str, Any]) -> NDArray[np.uint8]:
    """Normalised latents (C, F, H, W) to frames (F, height, width, 3)."""
    shift, scale = (z.new_tensor(latents[k]).view(-1, 1, 1, 1) for k in ("shift", "scale"))
    z = z / scale + shift
    if latents["temporal"] == 1:  # a VAE of pictures: it takes frames as a batch of them
        parts = [vae.decode(part).sample for part in torch.split(z.transpose(0, 1), PICTURES)]
        frames = torch.cat(parts)
    else:
        frames = vae.decode(z[None]).sample[0].transpose(0, 1)
    values = frames.float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return values.permute(0, 2, 3, 1).cpu().numpy()


def save(
    path: Path, videos: Sequence[NDArray[np.uint8]], prompts: Sequence[str], fps: float
) -> NDArray[np.uint8]:
    """Writes videos of one shape, each with its prompt: a .gif or .mp4 of them all side by side, or
    a .png with a row of each one's frames. Returns them side by side (F, H, W, 3)."""
    frames = tile(videos, prompts, across(len(videos)))
    if path.suffix == ".png":
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(strips(videos, prompts)).save(path)
    else:
        write(path, frames, fps)
    return frames


def tile(
    videos: Sequence[NDArray[np.uint8]], prompts: Sequence[str], columns: int | None = None
) -> NDArray[np.uint8]:
    """Videos of one shape, each under its prompt, in rows of `columns` (default: one row):
    (F, H, W, 3), H and W even."""
    videos = [_enlarged(video, TILE) for video in videos]
    frames, _, width, _ = videos[0].shape
    heads = _heads(prompts, width)
    above = max(len(head) for head in heads)
    tiles = []
    for video, head in zip(videos, heads):
        head = np.pad(head, [(0, above - len(head)), (0, 0), (0, 0)], constant_values=255)
        repeated = np.broadcast_to(head, (frames, above, width, 3))
        tiles.append(np.concatenate([repeated, video], 1))
    columns = columns or len(tiles)
    tiles += [np.full_like(tiles[0], 255)] * (-len(tiles) % columns)
    rows = [np.concatenate(tiles[n : n + columns], 2) for n in range(0, len(tiles), columns)]
    joined = np.concatenate(rows, 1)
    odd = [(0, 0), (0, joined.shape[1] % 2), (0, joined.shape[2] % 2), (0, 0)]
    return np.pad(joined, odd, mode="edge")  # as yuv420p wants them


def strips(videos: Sequence[NDArray[np.uint8]], prompts: Sequence[str]) -> NDArray[np.uint8]:
    """Videos of one shape, one below the other, of each its prompt and under it some frames in a
    row, evenly apart from the first to the last: (H, W, 3)."""
    length = len(videos[0])
    chosen = np.linspace(0, length - 1, min(STRIP, length)).round().astype(int)
    gap = [(0, 0), (0, 0), (0, GAP), (0, 0)]
    rows = []
    for video in videos:
        frames = np.pad(_enlarged(video[chosen], FRAME), gap, constant_values=255)
        rows.append(np.concatenate(list(frames), 1))
    heads = _heads(prompts, rows[0].shape[1])
    return np.concatenate([part for both in zip(heads, rows) for part in both])


def _enlarged(frames: NDArray[np.uint8], least: int) -> NDArray[np.uint8]:
    """Each pixel as a square of pixels, so that they are `least` wide."""
    factor = max(1, -(-least // frames.shape[2]))
    return frames.repeat(factor, 1).repeat(factor, 2)


def _heads(prompts: Sequence[str], width: int) -> list[NDArray[np.uint8]]:
    """The prompts in lines of `width` pixels, black on white: (H, width, 3)."""
    font = ImageFont.load_default(12)
    heads = []
    for prompt in prompts:
        lines = textwrap.wrap(prompt, max(8, width // LETTER))
        head = Image.new("RGB", (width, LINE * len(lines) + 8), "white")
        ImageDraw.Draw(head).text((4, 3), "\n".join(lines), "black", font)
        heads.append(np.asarray(head))
    return heads


def across(videos: int) -> int:
    """The columns of so many tiles: about a square."""
    return videos if videos < 4 else math.ceil(math.sqrt(videos))


def write(path: Path, frames: NDArray[np.uint8], fps: float) -> None:
    """A .gif or .mp4 of frames (F, H, W, 3), their height and width even."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gif":
        path.write_bytes(gif([Image.fromarray(frame) for frame in frames], fps))
        return
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.options = "yuv420p", {"crf": "16"}
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            container.mux(stream.encode(picture))
        container.mux(stream.encode())


def gif(pictures: Sequence[Image.Image], fps: float) -> bytes:
    # It counts time in hundredths of a second.
    durations = np.diff(np.round(np.arange(len(pictures) + 1) * 100 / fps)) * 10
    file = io.BytesIO()
    pictures[0].save(
        file,
        "GIF",
        save_all=True,
        append_images=list(pictures[1:]),
        duration=[int(d) for d in durations],
        loop=0,
    )
    return file.getvalue()
