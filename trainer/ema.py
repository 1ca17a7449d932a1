"""A moving average of the weights that are trained, by diffusers' EMAModel.

Its decay after n steps is min(decay, 1 - (1 + n) ** -power): early steps, which are far from the
last, are forgotten soon.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

FILE = "ema.safetensors"


def average_of(ema: Ema | None) -> AbstractContextManager[None]:
    """The model has the average for its weights meanwhile, where there is one."""
    return nullcontext() if ema is None else ema.applied()


class Ema:
    """The average of the weights of `model`, on its device, from now on."""

    def __init__(self, model: nn.Module, decay: float, power: float) -> None:
        from diffusers.training_utils import EMAModel  # seconds to import

        self._weights = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._average: Any = EMAModel(
            self._weights.values(), decay=decay, use_ema_warmup=True, power=power, foreach=True
        )

    def update(self) -> None:
        """Takes the weights in, after a step."""
        self._average.step(self._weights.values())

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The average stands in the model in place of the weights, which come back after it, bit
        for bit. All processes enter it together."""
        self._average.store(self._weights.values())
        try:
            self._average.copy_to(self._weights.values())
            yield
        finally:
            self._average.restore(self._weights.values())

    def state(self) -> dict[str, Tensor]:
        """The average, by the names of the weights."""
        return dict(zip(self._weights, self._average.shadow_params, strict=True))

    def save(self, folder: Path) -> None:
        values = {name: value.contiguous() for name, value in self.state().items()}
        save_file(values, folder / FILE, {"steps": str(self._average.optimization_step)})

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        with safe_open(folder / FILE, "pt") as file:
            self._average.optimization_step = int(file.metadata()["steps"])
            for name, value in self.state().items():
                value.copy_(file.get_tensor(name))
