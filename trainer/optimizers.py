"""Optimisers by name, and the learning rate of each step.

What is not part of PyTorch is looked for when it is asked for: a missing package is an error that
says how to get it.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from trainer.config import SettingsError, TrainSettings

MODULES = {
    "adamw_8bit": "bitsandbytes.optim",
    "adamw_offload": "torchao.optim",
    "prodigy": "prodigyopt",
}


def check(settings: TrainSettings) -> None:
    """Raises SettingsError where the optimiser's package is missing."""
    if settings.optimizer in MODULES:
        _module(settings.optimizer)


def check_spread(settings: TrainSettings, fsdp2: bool, zero: bool) -> None:
    """Raises SettingsError where FSDP2 or DeepSpeed's ZeRO spreads weights or the optimiser's
    state, and the optimiser cannot do with that."""
    if fsdp2 and settings.optimizer == "adamw_8bit":
        raise SettingsError(
            "train.optimizer is adamw_8bit, but bitsandbytes knows no weights that FSDP2 spreads: "
            "set it to adamw, whose state is spread as well, or take --accelerate zero2"
        )
    if (fsdp2 or zero) and settings.optimizer == "prodigy":
        # ZeRO: each process finds the rate of its own part. FSDP2: state of weights that began as
        # zeros is not loaded, or not as it was.
        raise SettingsError(
            "train.optimizer is prodigy, which cannot find its rate, or not go on as it was, where "
            "weights are spread over processes: set it to adamw, or leave --accelerate out"
        )


def build(
    model: nn.Module, settings: TrainSettings, device: torch.device, world: int = 1
) -> Optimizer:
    """The optimiser of what is trained of a model, which is to be moved to `device`.

    Raises SettingsError where its package is missing, or a GPU that it is for, or where it cannot
    do with `world` processes.
    """
    groups, name = decayed(model, settings.weight_decay), settings.optimizer
    options: dict[str, Any] = {"lr": settings.learning_rate, "betas": settings.betas}
    if name == "adamw":
        return torch.optim.AdamW(groups, **options, fused=device.type in ("cuda", "cpu"))
    if name == "prodigy":
        # As its authors advise for diffusion; the estimate starts too high in a warm-up otherwise.
        made: Optimizer = _module(name).Prodigy(
            groups, **options, safeguard_warmup=True, use_bias_correction=True
        )
        return made
    if name == "adamw_8bit":
        made = _module(name).AdamW8bit(groups, **options)
        return made
    if world > 1:
        raise SettingsError(
            f"train.optimizer is adamw_offload, but there are {world} processes, and it takes "
            "gradients before they have been exchanged: set it to adamw_8bit, or train on one GPU"
        )
    module = _module(name)
    if device.type != "cuda":
        raise SettingsError(
            "train.optimizer is adamw_offload, which saves memory of a GPU, and this machine has "
            "none: set it to adamw"
        )
    model.to(device)  # it copies the weights to the host, from where they are
    made = module.CPUOffloadOptimizer(groups, torch.optim.AdamW, **options)
    return made


def resumed(optimizer: Any, decays: Sequence[float]) -> None:
    """Puts right what a checkpoint does not: weight decay is as set now (`decays` of the groups),
    not as saved, and what works on copies of the weights has those of before."""
    for group, decay in zip(optimizer.param_groups, decays, strict=True):
        group["weight_decay"] = decay
    inner = getattr(optimizer, "optimizer", optimizer)  # within accelerate's
    for weight, copy in getattr(inner, "param_d2h_map", {}).items():
        copy.data.copy_(weight.data)


def decayed(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices, which decay, and vectors (biases, norms), which do not; without those
    that are empty, or not trained."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups: Iterable[dict[str, Any]] = (
        {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
    )
    return [group for group in groups if group["params"]]


def learning_rate(settings: TrainSettings, step: int) -> float:
    """The rate of the step after `step` steps: it rises in a line over `warmup` steps, then stays
    (constant), or falls as half a cosine and would be 0 after the last step."""
    most = settings.learning_rate
    if step < settings.warmup:
        return most * (step + 1) / settings.warmup
    if settings.lr_schedule == "constant":
        return most
    share = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    return most * (1 + math.cos(math.pi * min(1.0, share))) / 2


def _module(name: str) -> Any:
    try:
        return importlib.import_module(MODULES[name])
    except ImportError as error:
        package = MODULES[name].partition(".")[0]
        raise SettingsError(
            f"train.optimizer is {name}, but {package} cannot be imported ({error}): "
            f"pip install {package}, or set it to adamw"
        ) from error
