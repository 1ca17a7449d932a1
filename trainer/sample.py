"""Makes videos of prompts: `python -m trainer.sample --checkpoint DIR --prompt TEXT --out FILE`.

DIR is a checkpoint, an exported model, or a run's output folder. The sampler is DDIM without noise,
which for flow matching is Euler's method: x0 and noise are read off the model's output and mixed
anew for the next time. Guidance is classifier-free (Ho & Salimans 2022), against no caption.
"""

from __future__ import annotations

import argparse
import itertools
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor

from manifests.redact import shown
from trainer import checkpoint, models, objectives
from trainer.checkpoint import CheckpointError
from trainer.config import ModelConfig, SettingsError
from trainer.families import Family
from trainer.pictures import FORMATS, decode, load_vae, save
from trainer.prompts import text_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

AT_ONCE = 4  # videos

# epsilon says nothing about x0 where the signal is below this share: x0 = (x - s eps) / a.
FAINTEST = 0.05

ABOUT = "Makes videos of prompts with a trained model."

Model = Callable[..., Tensor]  # latents, times, text; with a picture: first frames, who is told


# ----------------------------------------------------------------------------- latents of prompts


def sample(
    model: Model,
    config: ModelConfig,
    prompts: Sequence[str],
    steps: int = 30,
    guidance: float = 3.0,
    seed: int | Sequence[int] = 0,
    device: str = "cpu",
    encoder: str | None = None,
    tokenizer: str | None = None,
    shift: float | None = None,
) -> Tensor:
    """Normalised latents of the prompts: (prompts, C, F, H, W) float32. `encoder` and `tokenizer`
    are those of stored embeddings (`trainer.prompts`); the rest is as in `denoise`."""
    text = text_of([*prompts, *[""] * len(prompts)], config, device, encoder, tokenizer)
    seeds = [seed] * len(prompts) if isinstance(seed, int) else seed
    return denoise(model, config, text, seeds, steps, guidance, device, shift=shift)


@torch.no_grad()
def denoise(
    model: Model,
    config: ModelConfig,
    text: models.Text,
    seeds: Sequence[int],
    steps: int,
    guidance: float,
    device: torch.device | str = "cpu",
    first: Tensor | None = None,
    told: Callable[[int], None] = lambda step: None,
    shift: float | None = None,
) -> Tensor:
    """Normalised latents (B, C, F, H, W) float32 of texts: B with a prompt, then B without.

    The noise of each depends on its seed alone, so that prompts can be compared. `first` are first
    frames (B, C, 1, H, W) to go on from, for families that do; `told` hears of each step; `shift`
    as in `sampling_times`.
    """
    noise = [torch.randn(config.shape, generator=torch.Generator().manual_seed(n)) for n in seeds]
    x = torch.stack(noise).to(device)
    picture: tuple[Tensor, ...] = ()
    if first is not None:
        picture = torch.cat([first, first]), torch.ones(2 * len(x), dtype=torch.bool, device=device)
    for number, (time, following) in enumerate(
        itertools.pairwise(sampling_times(config, steps, shift).to(device))
    ):
        both = model(torch.cat([x, x]), time.expand(2 * len(x)), text, *picture).float()
        with_text, without = both.chunk(2)
        output = without + guidance * (with_text - without)
        a, s = path(config, time.expand(len(x)))
        x, eps = objectives.resolve(config.objective, x, output, a, s)
        if following != 0:
            x = objectives.add_noise(x, eps, *path(config, following.expand(len(x))))
        told(number + 1)
    return x


def path(config: ModelConfig, time: Tensor) -> tuple[Tensor, Tensor]:
    return objectives.path(
        config.objective, config.schedule, time, config.zero_terminal_snr, config.snr_shift
    )


def sampling_times(config: ModelConfig, steps: int, shift: float | None = None) -> Tensor:
    """`steps` + 1 times from noise to data, the last one 0, evenly apart; those of flow matching
    moved towards noise by `shift`, or as far as in training."""
    if config.objective == "flow":
        even = torch.linspace(1, 0, steps + 1)
        return objectives.shifted(even, config.shift if shift is None else shift)
    signal = objectives.alphas_cumprod(
        config.schedule, config.zero_terminal_snr, config.snr_shift
    ).sqrt()
    usable = int((signal >= FAINTEST).sum()) if config.objective == "epsilon" else len(signal)
    return torch.linspace((usable - 1) / objectives.TIMESTEPS, 0, steps + 1)


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
    folder: Path,
    prompts: Sequence[str],
    vae: str | None,
    out: Path,
    *,
    num: int = 1,
    seed: int = 0,
    at_once: int = AT_ONCE,
    told: Callable[[str], None] = lambda line: None,
    **sampling: Any,
) -> NDArray[np.uint8]:
    """Samples `num` videos of each prompt, of `seed` and those after it, decodes and writes them;
    returns them side by side. `sampling` as in `sample`; `told` hears what is being done."""
    if out.suffix not in FORMATS:
        raise SettingsError(f"--out is {out}: it must end in .gif, .mp4 or .png")
    try:
        place = find(folder)
        model, config = models.load(place)
    except (ValueError, RuntimeError, SafetensorError) as error:
        raise CheckpointError(f"{folder} holds no model of this trainer: {error}") from error
    if isinstance(model, Family) and model.needs_picture:
        raise SettingsError(
            f"{folder} holds a model that goes on from a picture, and prompts alone do not do: "
            "sample it with a pipeline of diffusers"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    decoder = load_vae(vae or config.latents["vae"], config.latents, device)
    model = model.to(device)
    wanted = [(prompt, seed + n) for prompt in prompts for n in range(num)]
    videos: list[NDArray[np.uint8]] = []
    told(f"{len(wanted)} videos of {place} on {device}")
    for begin in range(0, len(wanted), at_once):
        some, seeds = zip(*wanted[begin : begin + at_once])
        latents = sample(model, config, some, seed=seeds, device=device, **sampling)
        videos += [decode(decoder, one, config.latents) for one in latents]
        told(f"{len(videos)} of {len(wanted)} videos are made")
    titles = [f"{prompt} ({n})" if num > 1 else prompt for prompt, n in wanted]
    return save(out, videos, titles, config.latents["sampling"].get("fps", 16))


def read_prompts(file: Path) -> list[str]:
    """One a line; empty lines are none. Raises SettingsError."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"--prompts-file {file} cannot be read: {error}") from error
    if not (prompts := [line.strip() for line in lines if line.strip()]):
        raise SettingsError(f"--prompts-file {file} has no prompts: one a line is expected")
    return prompts


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m trainer.sample", description=ABOUT)
    parser.add_argument("--checkpoint", type=Path, required=True, help="or a run's output folder")
    parser.add_argument("--prompt", action="append", default=[], help="may be repeated")
    parser.add_argument("--prompts-file", type=Path, help="prompts, one a line")
    parser.add_argument("--vae", help="its diffusers folder; default: as the latents were made")
    parser.add_argument("--text-encoder", help="of stored embeddings; default: as these were made")
    parser.add_argument("--tokenizer", help="its tokenizer's folder; default: the same")
    parser.add_argument("--out", type=Path, required=True, help="a .gif, .mp4 or .png")
    parser.add_argument("--num", type=int, default=1, help="videos of each prompt")
    parser.add_argument("--steps", type=int, default=30, help="model calls of the sampler")
    parser.add_argument("--guidance", type=float, default=3.0, help="1: none")
    parser.add_argument("--shift", type=float, help="of flow's times; default: as in training")
    parser.add_argument("--seed", type=int, default=0, help="of the noise; of --num's first")
    parser.add_argument("--at-once", type=int, default=AT_ONCE, help="videos: fewer, less memory")
    given = parser.parse_args(arguments)

    def say(line: str) -> None:
        print(shown(f"vidpipe sample: {line}"), file=sys.stderr, flush=True)

    try:
        for name in ("num", "steps", "at_once"):
            if (value := getattr(given, name)) < 1:
                raise SettingsError(f"--{name.replace('_', '-')} is {value}: it must be at least 1")
        if given.shift is not None and not 0 < given.shift < math.inf:
            raise SettingsError(f"--shift is {given.shift}: it must be above 0, as 3 or 5")
        prompts = given.prompt + (read_prompts(given.prompts_file) if given.prompts_file else [])
        if not prompts:
            raise SettingsError("no prompt: give --prompt TEXT, or --prompts-file FILE")
        make(
            given.checkpoint,
            prompts,
            given.vae,
            given.out,
            num=given.num,
            seed=given.seed,
            at_once=given.at_once,
            told=say,
            steps=given.steps,
            guidance=given.guidance,
            shift=given.shift,
            encoder=given.text_encoder,
            tokenizer=given.tokenizer,
        )
    except (SettingsError, CheckpointError) as error:
        say(str(error))
        return 2
    say(f"written to {given.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
