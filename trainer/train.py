"""Trains a video model on the latents of an index: `python -m trainer.train --config FILE.json`.

Exit codes: 0 trained, or stopped by SIGTERM and saved; 1 the loss is no number any more; 2 the
settings, the index or a checkpoint cannot be used. The same command again goes on from the newest
checkpoint in `output`, bit for bit on the same machine and number of processes.
"""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import ProjectConfiguration, set_seed
from torch import Tensor, nn

from manifests.redact import redact_logs, shown
from manifests.shards import Index, ShardError
from trainer import checkpoint as checkpoints
from trainer import objectives
from trainer.checkpoint import CheckpointError, adapters_only
from trainer.config import (
    FamilySettings,
    ModelConfig,
    SettingsError,
    TrainSettings,
    load_settings,
)
from trainer.data import Batch, Loader
from trainer.families import Family
from trainer.keys import keyed
from trainer.models import Text, VideoDiT, adapted, build, tokenise

# Noise makes gradients noisy, and runs of a few hundred steps are over before 0.999 has settled.
BETAS = (0.9, 0.99)
MIN_SNR_GAMMA = 5.0  # Hang 2023's own choice
ECHO_SECONDS = 10.0  # for which a second signal is the first one's

ABOUT = "Trains a video model on the latents of an index, from the newest checkpoint on."


@dataclass(frozen=True)
class Traits:
    """What the loss must know of a model, which may stand inside others by then."""

    cells: int  # of latents, that make one token
    clean_frame: bool  # a first frame that is told has no noise, and no loss

    @classmethod
    def of(cls, model: VideoDiT | Family) -> Traits:
        return cls(math.prod(model.patch), isinstance(model, Family) and model.clean_frame)


class Diverged(Exception):
    """The loss is no finite number."""


def train(settings: TrainSettings) -> Path:
    """Trains to `settings.steps` and returns the folder of the last checkpoint.

    Raises SettingsError, ShardError, CheckpointError before the first step, ShardError and Diverged
    at any.
    """
    # ------------------------------------------------------------------------- data and processes
    index = Index.open(settings.index)
    accelerator = start(settings)
    device, world = accelerator.device, accelerator.num_processes
    say = accelerator.on_main_process(lambda line: print(shown(line), file=sys.stderr, flush=True))
    pin = device.type == "cuda"
    loader = Loader(index, settings, accelerator.process_index, world, pin)

    # ------------------------------------------------------------------------- model and optimiser
    config = ModelConfig(
        model=settings.model,
        text=settings.text,
        objective=settings.objective,
        schedule=settings.schedule,
        zero_terminal_snr=settings.zero_terminal_snr,
        shape=loader.shape,
        latents=index.spec.to_json(),
        embeddings=loader.embeddings and loader.embeddings.spec.to_json(),
    )
    set_seed(settings.seed)
    model = build(config)
    if isinstance(model, Family):
        config = config.model_copy(update={"arch": model.config})
        for shape in loader.order.shapes:
            model.check_shape((index.spec.channels, *shape[1:]))
        if adapted(config):
            accelerator.register_save_state_pre_hook(lambda _, w, __: adapters_only(w))
    traits = Traits.of(model)
    if settings.gradient_checkpointing:
        model.checkpoint()
    if settings.compile:
        model.compile()
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    groups = decayed(model, settings.weight_decay)
    optimizer = torch.optim.AdamW(groups, settings.learning_rate, BETAS)
    model, optimizer = accelerator.prepare(model, optimizer)

    # ------------------------------------------------------------------------- resume
    step, position, folder = 0, loader.start(), settings.output
    if found := checkpoints.latest(settings.output):
        checkpoints.restore(accelerator, found, config)
        for group, fresh in zip(optimizer.param_groups, groups):
            group["weight_decay"] = fresh["weight_decay"]  # as set now, not as saved
        step, folder = found.step, found.folder
        position, note = loader.resume(found.position)
        say(f"goes on from {folder}" + f": {note}" * bool(note))
    accelerator.init_trackers("train", init_kwargs={"tensorboard": {"purge_step": step + 1}})
    say(
        f"{len(loader)} clips of {loader.shapes}, {parameters:,} parameters, {world} x "
        f"{device.type}, mixed precision {accelerator.mixed_precision}, steps {step} to "
        f"{settings.steps}"
    )
    if index.text is not None and loader.embeddings is None:
        say("the index has text embeddings, which are not used: train.text.kind is not stored")

    # ------------------------------------------------------------------------- the loop
    model.train()
    meter = Meter()
    with stop_signals() as stop, closing(loader.batches(position)) as batches:
        stopped = False  # on any process, known to all
        while step < settings.steps and not stopped:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(settings, step)
            for _ in range(settings.gradient_accumulation):
                with meter.waiting():
                    batch = next(batches)
                with accelerator.accumulate(model):
                    losses = clip_losses(model, batch, settings, device, traits)
                    everyones, stopped = share(accelerator, losses, stop.is_set())
                    check_finite(everyones, losses, batch, step)
                    accelerator.backward(losses.mean())
                    if accelerator.sync_gradients:
                        norm = accelerator.clip_grad_norm_(model.parameters(), settings.grad_clip)
                    optimizer.step()
                    optimizer.zero_grad()
                meter.add(everyones)
            step, position = step + 1, batch.position

            if step % settings.log_every == 0 or step == settings.steps:
                values = {"lr": learning_rate(settings, step - 1), "grad_norm": float(norm)}
                values = {**meter.read(), **values, "epoch": position.epoch}
                accelerator.log(values, step=step)
                say(line(step, settings.steps, values))
            if step % settings.save_every == 0 or step == settings.steps or stopped:
                folder = checkpoints.save(
                    accelerator, settings.output, step, position, config, settings.keep
                )

    # ------------------------------------------------------------------------- the end
    if step >= settings.steps:
        checkpoints.export(accelerator, model, config, settings.output / "model")
        say(f"trained {step} steps; the model is in {settings.output / 'model'}")
    else:
        say(f"stopped at step {step} of {settings.steps}: the same command goes on from there")
    accelerator.print(f"checkpoint: {folder}")
    accelerator.end_training()
    return folder


# ----------------------------------------------------------------------------- parts of the loop


def start(settings: TrainSettings) -> Accelerator:
    """The processes, their device and precision. Raises SettingsError and CheckpointError."""
    try:
        settings.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"train.output cannot be written: {error}") from error
    precision = settings.mixed_precision
    if precision == "auto":
        on_gpu = PartialState().device.type == "cuda" and torch.cuda.is_bf16_supported()
        precision = "bf16" if on_gpu else "no"
    torch.set_float32_matmul_precision("high")  # TF32 where there is: what is left in float32
    try:
        return Accelerator(
            mixed_precision=precision,
            gradient_accumulation_steps=settings.gradient_accumulation,
            log_with="tensorboard",
            project_config=ProjectConfiguration(
                project_dir=str(settings.output), logging_dir=str(settings.output / "logs")
            ),
        )
    except ValueError as error:
        raise SettingsError(f"train.mixed_precision is {precision}: {error}") from error


def decayed(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Two groups: matrices, which decay, and vectors (biases, norms), which do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    ]


def learning_rate(settings: TrainSettings, step: int) -> float:
    """The rate of the step after `step` steps: it rises in a line, then stays."""
    return settings.learning_rate * min(1.0, (step + 1) / max(1, settings.warmup))


def clip_losses(
    model: nn.Module,
    batch: Batch,
    settings: TrainSettings,
    device: torch.device,
    traits: Traits,
) -> Tensor:
    """The loss of each clip (B,), its time and noise keyed on the visit."""
    kind, seed = settings.objective, settings.seed
    visits = list(zip(batch.epochs, batch.clip_ids))
    x0 = batch.latents(device)
    time = draw_times(settings, visits, math.prod(x0.shape[2:]) // traits.cells).to(device)
    noise = torch.empty_like(x0)
    for row, (epoch, clip) in zip(noise, visits):
        row.normal_(generator=keyed("noise", seed, epoch, clip, str(device)))

    a, s = objectives.path(kind, settings.schedule, time, settings.zero_terminal_snr)
    text = text_of(batch, settings, device)
    picture = first_frames(batch, settings, device)
    output = model(objectives.add_noise(x0, noise, a, s), time, text, *picture)
    wanted = objectives.target(kind, x0, noise, a, s)
    gamma = settings.min_snr_gamma or MIN_SNR_GAMMA
    weights = objectives.weight(kind, a, s, settings.loss_weight, gamma)
    counted = None
    if picture and traits.clean_frame:
        counted = torch.ones_like(x0[:, :1])
        counted[picture[1], :, 0] = 0
    return objectives.losses(output, wanted, weights, counted)


def first_frames(
    batch: Batch, settings: TrainSettings, device: torch.device
) -> tuple[Tensor, Tensor] | tuple[()]:
    """The first frames of the batch and which clips are told theirs; () where the run has none."""
    first = batch.first_frames(device)
    if first is None or not isinstance(settings.model, FamilySettings):
        return ()
    chances = [
        torch.rand((), generator=keyed("told", settings.seed, epoch, clip))
        for epoch, clip in zip(batch.epochs, batch.clip_ids)
    ]
    return first, (torch.stack(chances) < settings.model.first_frame).to(device)


def draw_times(settings: TrainSettings, visits: Sequence[tuple[int, str]], tokens: int) -> Tensor:
    """The time of each visit (B,): of clips of so many tokens."""
    shift = settings.shift
    if settings.shift_tokens is not None:
        shift = objectives.token_shift(tokens, *settings.shift_tokens)
    mean, std = settings.timestep_mean, settings.timestep_std
    times = [
        objectives.draw_time(settings.density, keyed("time", settings.seed, epoch, clip), mean, std)
        for epoch, clip in visits
    ]
    time = objectives.shifted(torch.stack(times), shift)
    return time if settings.objective == "flow" else objectives.on_schedule(time)


def text_of(batch: Batch, settings: TrainSettings, device: torch.device) -> Text:
    """What the model is told of the batch's captions."""
    if batch.embeddings is None:
        return tokenise(batch.captions, settings.text).to(device)
    values, mask = batch.embeddings
    return values.to(device, non_blocking=True), mask.to(device)


def share(accelerator: Accelerator, losses: Tensor, stop: bool) -> tuple[Tensor, bool]:
    """The losses of all processes, and whether any was told to stop: one exchange for both, so
    that all leave the loop at the same step."""
    told = torch.full((1,), float(stop), device=losses.device)
    everyones = accelerator.gather(torch.cat([losses.detach(), told])).view(-1, len(losses) + 1)
    return everyones[:, :-1], bool(everyones[:, -1].any())


def check_finite(everyones: Tensor, losses: Tensor, batch: Batch, step: int) -> None:
    """Raises Diverged on all processes where a loss of any is no finite number."""
    if everyones.isfinite().all():
        return
    bad = [clip for clip, fine in zip(batch.clip_ids, losses.isfinite().tolist()) if not fine]
    raise Diverged(
        f"the loss is no finite number at step {step + 1}, clips "
        f"{', '.join(bad) or 'of another process'}: look at their latents, or train with a lower "
        "train.learning_rate or in bf16 from the last checkpoint"
    )


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event that SIGTERM and Ctrl-C set; a second signal acts as it would without us, unless it
    is the first one's echo: launchers and Slurm pass on what the process has heard already."""
    stop = threading.Event()
    heard = 0.0
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}

    def told(number: int, frame: object) -> None:
        nonlocal heard
        if not stop.is_set():
            stop.set()
            heard = time.monotonic()
        elif time.monotonic() - heard > ECHO_SECONDS:
            signal.signal(number, before[signal.Signals(number)])
            os.kill(os.getpid(), number)

    for number in before:
        signal.signal(number, told)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class Meter:
    """Loss, speed and waiting since it was last read."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.began, self.waited = time.perf_counter(), 0.0
        self.losses: list[Tensor] = []

    @contextmanager
    def waiting(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self.waited += time.perf_counter() - began

    def add(self, losses: Tensor) -> None:
        self.losses.append(losses.flatten())

    def read(self) -> dict[str, float]:
        losses, elapsed = torch.cat(self.losses), time.perf_counter() - self.began
        values = {
            "loss": losses.mean().item(),
            "clips_per_second": len(losses) / elapsed,
            "data_wait": self.waited / elapsed,
        }
        self.reset()
        return values


def line(step: int, steps: int, values: dict[str, float]) -> str:
    return (
        f"step {step}/{steps}  loss {values['loss']:.4f}  lr {values['lr']:.2e}  "
        f"grad {values['grad_norm']:.3f}  {values['clips_per_second']:.1f} clips/s  "
        f"data wait {values['data_wait']:.0%}  epoch {values['epoch']}"
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m trainer.train", description=ABOUT)
    parser.add_argument("--config", required=True, type=Path, help="JSON file of the settings")
    redact_logs()
    try:
        train(load_settings(parser.parse_args(arguments).config))
    except (SettingsError, ShardError, CheckpointError, Diverged) as error:
        print(shown(f"vidpipe train: {error}"), file=sys.stderr)
        return 1 if isinstance(error, Diverged) else 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
