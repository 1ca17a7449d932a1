"""Makes videos of prompts: `python -m trainer.sample --checkpoint DIR --prompt TEXT --out FILE`.

DIR is a checkpoint, an exported model, or a run's output folder. The sampler is DDIM without noise,
which for flow matching is Euler's method: x0 and noise are read off the model's output and mixed
anew for the next time. Guidance is classifier-free (Ho & Salimans 2022), against no caption.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
import textwrap
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from safetensors import SafetensorError
from torch import Tensor

from manifests.redact import shown
from trainer import checkpoint, models, objectives
from trainer.checkpoint import CheckpointError
from trainer.config import ModelConfig, SettingsError
from trainer.families import Family
from trainer.prompts import text_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

PICTURES = 16  # frames decoded at once
TILE = 192  # pixels: smaller videos are enlarged, so that the prompt above can be read
SHEET = 8  # frames of a PNG

# epsilon says nothing about x0 where the signal is below this share: x0 = (x - s eps) / a.
FAINTEST = 0.05

ABOUT = "Makes videos of prompts with a trained model."

Model = Callable[[Tensor, Tensor, models.Text], Tensor]  # latents, times, text


# ----------------------------------------------------------------------------- latents of prompts


@torch.inference_mode()
def sample(
    model: Model,
    config: ModelConfig,
    prompts: Sequence[str],
    steps: int = 30,
    guidance: float = 3.0,
    seed: int = 0,
    device: str = "cpu",
    encoder: str | None = None,
    tokenizer: str | None = None,
) -> Tensor:
    """Normalised latents of the prompts: (prompts, C, F, H, W) float32. Each prompt's noise
    depends on the seed alone, so they can be compared. `encoder` and `tokenizer` are those of
    stored embeddings (`trainer.prompts`)."""
    kind = config.objective
    noise = torch.randn(config.shape, generator=torch.Generator().manual_seed(seed))
    x = torch.stack([noise] * len(prompts)).to(device)
    text = text_of([*prompts, *[""] * len(prompts)], config, device, encoder, tokenizer)

    times = sampling_times(config, steps).to(device)
    for time, following in itertools.pairwise(times):
        both = model(torch.cat([x, x]), time.expand(2 * len(x)), text).float()
        with_text, without = both.chunk(2)
        output = without + guidance * (with_text - without)
        a, s = path(config, time.expand(len(x)))
        x0, eps = objectives.resolve(kind, x, output, a, s)
        if following == 0:
            return x0
        x = objectives.add_noise(x0, eps, *path(config, following.expand(len(x))))
    return x


def path(config: ModelConfig, time: Tensor) -> tuple[Tensor, Tensor]:
    return objectives.path(
        config.objective, config.schedule, time, config.zero_terminal_snr, config.snr_shift
    )


def sampling_times(config: ModelConfig, steps: int) -> Tensor:
    """`steps` + 1 times from noise to data, evenly apart, the last one 0."""
    if config.objective == "flow":
        return torch.linspace(1, 0, steps + 1)
    signal = objectives.alphas_cumprod(
        config.schedule, config.zero_terminal_snr, config.snr_shift
    ).sqrt()
    usable = int((signal >= FAINTEST).sum()) if config.objective == "epsilon" else len(signal)
    return torch.linspace((usable - 1) / objectives.TIMESTEPS, 0, steps + 1)


# ----------------------------------------------------------------------------- pictures of latents


def load_vae(folder: str, latents: dict[str, Any], device: str = "cpu") -> torch.nn.Module:
    """The VAE that the latents were made with. Raises SettingsError where `folder` has another."""
    file = Path(folder) / "config.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8")).get("_class_name")
    except (OSError, ValueError) as error:
        raise SettingsError(f"{folder} is no VAE of diffusers: {error}") from error
    if found != latents["vae_class"]:
        raise SettingsError(
            f"{folder} holds a {found}, but the latents were made with a {latents['vae_class']}, "
            f"{latents['vae']}: pass its folder as --vae"
        )
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


def tile(videos: Sequence[NDArray[np.uint8]], prompts: Sequence[str]) -> NDArray[np.uint8]:
    """Videos of one shape side by side, each under its prompt: (F, H, W, 3), H and W even."""
    frames, _, width, _ = videos[0].shape
    factor = max(1, -(-TILE // width))
    font = ImageFont.load_default(12)
    captions = [textwrap.wrap(prompt, max(8, factor * width // 7)) for prompt in prompts]
    above = 15 * max(map(len, captions)) + 8
    tiles = []
    for video, text in zip(videos, captions):
        head = Image.new("RGB", (factor * width, above), "white")
        ImageDraw.Draw(head).text((4, 3), "\n".join(text), "black", font)
        large = video.repeat(factor, 1).repeat(factor, 2)
        heads = np.broadcast_to(np.asarray(head), (frames, above, factor * width, 3))
        tiles.append(np.concatenate([heads, large], 1))
    joined = np.concatenate(tiles, 2)
    odd = [(0, 0), (0, joined.shape[1] % 2), (0, joined.shape[2] % 2), (0, 0)]
    return np.pad(joined, odd, mode="edge")  # as yuv420p wants them


def write(path: Path, frames: NDArray[np.uint8], fps: float) -> None:
    """A .gif or .mp4 of frames (F, H, W, 3), or a .png of some of them one below the other."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pictures = [Image.fromarray(frame) for frame in frames]
    if path.suffix == ".gif":
        # GIF counts time in hundredths of a second.
        durations = np.diff(np.round(np.arange(len(frames) + 1) * 100 / fps)) * 10
        pictures[0].save(
            path,
            save_all=True,
            append_images=pictures[1:],
            duration=[int(d) for d in durations],
            loop=0,
        )
    elif path.suffix == ".png":
        chosen = np.linspace(0, len(frames) - 1, min(SHEET, len(frames))).round().astype(int)
        Image.fromarray(np.concatenate([frames[i] for i in chosen], 0)).save(path)
    else:
        import av

        with av.open(str(path), "w") as container:
            stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt, stream.options = "yuv420p", {"crf": "16"}
            for frame in frames:
                picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
                container.mux(stream.encode(picture))
            container.mux(stream.encode())


# ----------------------------------------------------------------------------- the command


def find(folder: Path) -> Path:
    """The folder with the model: `folder`, its newest complete checkpoint, or its export."""
    if models.holds(folder):
        return folder
    if newest := checkpoint.latest(folder):
        return newest.folder
    if models.holds(folder / "model"):
        return folder / "model"
    raise CheckpointError(f"no model in {folder}: run `vidpipe train` first")


def make(
    folder: Path, prompts: Sequence[str], vae: str | None, out: Path, **sampling: Any
) -> NDArray[np.uint8]:
    """Samples, decodes and writes; returns the frames written. `sampling` as in `sample`."""
    if out.suffix not in (".gif", ".mp4", ".png"):
        raise SettingsError(f"--out is {out}: it must end in .gif, .mp4 or .png")
    try:
        model, config = models.load(find(folder))
    except (ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder} holds no model of this trainer: {error}") from error
    if isinstance(model, Family) and model.needs_picture:
        raise SettingsError(
            f"{folder} holds a model that goes on from a picture, and prompts alone do not do: "
            "sample it with a pipeline of diffusers"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    decoder = load_vae(vae or config.latents["vae"], config.latents, device)
    z = sample(model.to(device), config, prompts, device=device, **sampling)
    frames = tile([decode(decoder, one, config.latents) for one in z], prompts)
    write(out, frames, config.latents["sampling"].get("fps", 16))
    return frames


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m trainer.sample", description=ABOUT)
    parser.add_argument("--checkpoint", type=Path, required=True, help="or a run's output folder")
    parser.add_argument("--prompt", action="append", required=True, help="may be repeated")
    parser.add_argument("--vae", help="its diffusers folder; default: as the latents were made")
    parser.add_argument("--text-encoder", help="of stored embeddings; default: as these were made")
    parser.add_argument("--tokenizer", help="its tokenizer's folder; default: the same")
    parser.add_argument("--out", type=Path, required=True, help="a .gif, .mp4 or .png")
    parser.add_argument("--steps", type=int, default=30, help="model calls of the sampler")
    parser.add_argument("--guidance", type=float, default=3.0, help="1: none")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    given = parser.parse_args(arguments)
    sampling = {
        "steps": max(1, given.steps),
        "guidance": given.guidance,
        "seed": given.seed,
        "encoder": given.text_encoder,
        "tokenizer": given.tokenizer,
    }
    try:
        make(given.checkpoint, given.prompt, given.vae, given.out, **sampling)
    except (SettingsError, CheckpointError) as error:
        print(shown(f"vidpipe sample: {error}"), file=sys.stderr)
        return 2
    for prompt in given.prompt:
        print(shown(f"{given.out}: {prompt}"), file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
