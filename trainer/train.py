"""Trains a video model on the latents of an index: `python -m trainer.train --config FILE.json`.

Exit codes: 0 trained, or stopped by SIGTERM and saved; 1 the loss is no number any more; 2 the
settings, the index or a checkpoint cannot be used. The same command again goes on from the newest
checkpoint in `output`, bit for bit on the same machine and number of processes.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration, gather_object, set_seed
from torch import Tensor, nn

from manifests.redact import redact_logs, shown
from manifests.shards import Index, ShardError
from trainer import checkpoint as checkpoints
from trainer import disk, ending, optimizers, sharding, trackers
from trainer.checkpoint import CheckpointError, Unwritten, adapters_only
from trainer.config import ModelConfig, SettingsError, TrainSettings, load_settings
from trainer.data import Batch, Loader
from trainer.ema import FILE as EMA
from trainer.ema import Ema, average_of
from trainer.families import Family
from trainer.losses import Traits, clip_losses, shift_of
from trainer.meter import Meter, line
from trainer.models import adapted, build
from trainer.samples import Samples
from trainer.validation import Validation, split, told

ECHO_SECONDS = 10.0  # for which a second signal is the first one's

ABOUT = "Trains a video model on the latents of an index, from the newest checkpoint on."


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
    index, held = split(index, settings)
    loader = Loader(index, settings, accelerator.process_index, world, pin)
    validation = Validation(held, settings, accelerator) if held is not None else None

    # ------------------------------------------------------------------------- model and optimiser
    config = ModelConfig(
        model=settings.model,
        text=settings.text,
        objective=settings.objective,
        schedule=settings.schedule,
        zero_terminal_snr=settings.zero_terminal_snr,
        snr_shift=settings.snr_shift,
        shape=loader.shape,
        latents=index.spec.to_json(),
        embeddings=loader.embeddings and loader.embeddings.spec.to_json(),
    )
    samples = Samples(settings, config, held, accelerator) if settings.samples.prompts else None
    set_seed(settings.seed)
    model = build(config)
    if samples is not None:
        samples.check(model)
    if isinstance(model, Family):
        config = config.model_copy(update={"arch": model.config})
        for shape in loader.order.shapes:
            model.check_shape((index.spec.channels, *shape[1:]))
        if adapted(config):
            accelerator.register_save_state_pre_hook(lambda _, w, __: adapters_only(w))
            model.halve(accelerator.mixed_precision)
    traits = Traits.of(model)
    if settings.objective == "flow":
        config = config.model_copy(
            update={"shift": shift_of(settings, traits.tokens(config.shape))}
        )
    if settings.gradient_checkpointing:
        model.checkpoint()
    if settings.compile:
        model.compile()
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    optimizer = optimizers.build(model, settings, device, world)
    sharding.ready(accelerator, model)
    model, optimizer = accelerator.prepare(model, optimizer)

    # ------------------------------------------------------------------------- resume
    step, position, folder = 0, loader.start(), settings.output
    saved: Path | None = None  # the newest checkpoint
    if found := checkpoints.latest(settings.output):
        decays = [group["weight_decay"] for group in optimizer.param_groups]
        checkpoints.restore(accelerator, found, config)
        optimizers.resumed(optimizer, decays)
        step, folder = found.step, found.folder
        saved = folder
        position, note = loader.resume(found.position)
        say(f"goes on from {folder}" + f": {note}" * bool(note))
        if step >= settings.steps:
            say(f"{step} steps are done, and train.steps is {settings.steps}: raise it to train on")
    ema: Ema | None = None
    if settings.ema_decay is not None:
        ema = Ema(accelerator.unwrap_model(model), settings.ema_decay, settings.ema_power)
    if ema is not None and found and (found.folder / EMA).exists():
        ema.load(found.folder)
    tracked = trackers.begin(accelerator, settings, step, say)
    say(
        f"{len(loader)} clips of {loader.shapes}, {parameters:,} parameters, {world} x "
        f"{device.type}, mixed precision {accelerator.mixed_precision}, steps {step} to "
        f"{max(step, settings.steps)}"
    )
    if validation is not None:
        say(f"{validation.clips} clips are looked at that are held back from training")
    if samples is not None:
        say(f"{len(samples.prompts)} prompts are sampled every {settings.samples.every} steps")
    if index.text is not None and loader.embeddings is None:
        say("the index has text embeddings, which are not used: train.text.kind is not stored")

    # ------------------------------------------------------------------------- the loop
    model.train()
    meter = Meter(device, world, step, settings.steps, settings.gradient_accumulation)
    with stop_signals() as stop, closing(loader.batches(position)) as batches:
        stopped = False  # on any process, known to all
        while step < settings.steps and not stopped:
            for group in optimizer.param_groups:
                group["lr"] = optimizers.learning_rate(settings, step)
            for _ in range(settings.gradient_accumulation):
                with meter.waiting():
                    batch = next(batches)
                with accelerator.accumulate(model):
                    losses = clip_losses(model, batch, settings, device, traits)
                    everyones, stopped = share(accelerator, losses, stop.is_set())
                    check_finite(everyones, losses, batch, step, saved)
                    accelerator.backward(losses.mean())
                    if accelerator.sync_gradients:
                        norm = clipped(accelerator, model, settings)
                        if accelerator.mixed_precision != "fp16":  # which leaves such steps out
                            check_gradient(norm, batch, step, saved)
                    optimizer.step()
                    optimizer.zero_grad()
                meter.add(everyones)
            step, position = step + 1, batch.position
            if ema is not None:
                ema.update()

            if due(step, settings, settings.log_every):
                values = {
                    **meter.read(step),
                    "lr": optimizers.learning_rate(settings, step - 1),
                    "grad_norm": float(norm),
                    "epoch": position.epoch,
                }
                tracked.log(values, step)
                say(line(step, settings.steps, values, world))
            if validation is not None and due(step, settings, settings.validation.every):
                with meter.aside():
                    values = validation.losses(model, traits, ema)
                tracked.log(values, step)
                say(f"step {step}/{settings.steps}  {told(values)}")
            if due(step, settings, settings.save_every) or stopped:
                with meter.aside():
                    saved = folder = checkpoints.save(
                        accelerator, settings.output, step, position, config, settings.keep, ema
                    )
            if samples is not None and due(step, settings, settings.samples.every) and not stopped:
                with meter.aside(), average_of(ema):
                    samples.make(model, traits, step, tracked, say)

    # ------------------------------------------------------------------------- the end
    if step >= settings.steps:
        checkpoints.export(accelerator, model, config, settings.output / "model", ema)
        say(f"trained {step} steps; the model is in {settings.output / 'model'}")
    else:
        say(f"stopped at step {step} of {settings.steps}: the same command goes on from there")
    accelerator.print(f"checkpoint: {folder}")
    tracked.end()
    return folder


# ----------------------------------------------------------------------------- parts of the loop


def start(settings: TrainSettings) -> Accelerator:
    """The processes, their device and precision. Raises SettingsError and CheckpointError."""
    optimizers.check(settings)
    trackers.check(settings)
    try:
        settings.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"train.output cannot be written: {error}") from error
    processes, precision = sharding.join(), settings.mixed_precision
    if precision == "auto":
        on_gpu = processes.device.type == "cuda" and torch.cuda.is_bf16_supported()
        precision = "bf16" if on_gpu else "no"
    if precision == "fp16" and processes.device.type == "cpu":
        # accelerate leaves it out there without a word
        raise SettingsError(
            "train.mixed_precision is fp16, which is for GPUs: set it to bf16 or no"
        )
    torch.set_float32_matmul_precision("high")  # TF32 where there is: what is left in float32
    try:
        accelerator = Accelerator(
            mixed_precision=precision,
            gradient_accumulation_steps=settings.gradient_accumulation,
            deepspeed_plugin=sharding.deepspeed(settings),
            log_with=list(settings.trackers) or None,
            project_config=ProjectConfiguration(
                project_dir=str(settings.output), logging_dir=str(settings.output / trackers.LOGS)
            ),
        )
    except (ValueError, KeyError) as error:
        if "precision" in str(error):
            raise SettingsError(f"train.mixed_precision is {precision}: {error}") from error
        raise SettingsError(
            f"accelerate's configuration or environment cannot be used ({error}): correct what "
            "--accelerate names"
        ) from error
    zero = sharding.zero_stage(accelerator)
    optimizers.check_spread(settings, fsdp2=accelerator.is_fsdp2, zero=bool(zero))
    return accelerator


def due(step: int, settings: TrainSettings, every: int) -> bool:
    return step % every == 0 or step == settings.steps


def share(accelerator: Accelerator, losses: Tensor, stop: bool) -> tuple[Tensor, bool]:
    """The losses of all processes, and whether any was told to stop: one exchange for both, so
    that all leave the loop at the same step."""
    told = torch.full((1,), float(stop), device=losses.device)
    everyones = accelerator.gather(torch.cat([losses.detach(), told])).view(-1, len(losses) + 1)
    return everyones[:, :-1], bool(everyones[:, -1].any())


def check_finite(
    everyones: Tensor, losses: Tensor, batch: Batch, step: int, saved: Path | None
) -> None:
    """Raises Diverged on all processes where a loss of any is no finite number."""
    if everyones.isfinite().all():
        return
    bad = [clip for clip, fine in zip(batch.clip_ids, losses.isfinite().tolist()) if not fine]
    raise Diverged(
        f"the loss is no finite number at step {step + 1}, of clips "
        f"{', '.join(gather_object(bad))}: look at their latents{_after(batch, saved)}"
    )


def clipped(accelerator: Accelerator, model: nn.Module, settings: TrainSettings) -> float:
    """Cuts the gradient to `grad_clip`; its norm before. DeepSpeed has cut it by then, and taken
    the step."""
    most = settings.grad_clip or math.inf
    return float(accelerator.clip_grad_norm_(model.parameters(), most) or 0.0)


def check_gradient(norm: float, batch: Batch, step: int, saved: Path | None) -> None:
    """Raises Diverged, before it reaches the weights, where the gradient is no finite number. It is
    the same on all processes."""
    if not math.isfinite(norm):
        raise Diverged(
            f"the gradient is no finite number at step {step + 1}: look at the latents of the "
            f"batch{_after(batch, saved)}"
        )


def _after(batch: Batch, saved: Path | None) -> str:
    """What to do, and what of, when a step cannot be taken. All processes call it."""
    there = f"the last good checkpoint, {saved}" if saved else "the start (there is no checkpoint)"
    wider = " or in bf16" * (AcceleratorState().mixed_precision == "fp16")  # whose range ends early
    return (
        f", or train with a lower train.learning_rate{wider} from {there}. The batch: "
        f"{', '.join(gather_object(batch.clip_ids))}"
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


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m trainer.train", description=ABOUT)
    parser.add_argument("--config", required=True, type=Path, help="JSON file of the settings")
    redact_logs()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a launcher that is to outlive it may ignore it
    ending.watch()
    file = parser.parse_args(arguments).config
    try:
        settings = load_settings(file)
        with disk_faults(settings.output):
            train(settings)
    except (SettingsError, ShardError, CheckpointError, Diverged) as error:
        own = 1 if isinstance(error, Diverged) else 2
        code = ending.tell(shown(f"vidpipe train: {error}"), own)
        if isinstance(error, Unwritten):
            shutil.rmtree(error.part, ignore_errors=True)
        return code
    except Exception as error:
        if (code_of_another := ending.noted()) is not None:
            return code_of_another  # which is why this one fails, too
        if not ending.lost(error):
            raise
        return ending.tell(shown(f"vidpipe train: {_lost(error)}"), ending.LOST)
    return 0


@contextmanager
def disk_faults(output: Path) -> Iterator[None]:
    """Raises CheckpointError where there is no room for anything else that is written, as logs."""
    before = threading.excepthook

    def of_thread(fault: threading.ExceptHookArgs) -> None:
        if not disk.full(fault.exc_value):  # what TensorBoard's then raises here, too
            before(fault)

    threading.excepthook = of_thread
    try:
        yield
    except OSError as error:
        if not disk.full(error):
            raise
        file = Path(error.filename) if isinstance(error.filename, str) else output
        raise CheckpointError(checkpoints.unwritten(file, error, output)) from error
    finally:
        threading.excepthook = before


def _lost(error: Exception) -> str:
    return (
        f"another process is gone or cannot be reached ({' '.join(str(error).split())}): the same "
        "command goes on from the newest checkpoint"
    )


if __name__ == "__main__":
    sys.exit(main())
