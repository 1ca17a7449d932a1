"""A moving average of the weights that are trained.

Its decay at the n-th step is min(decay, 1 - n ** -power), as diffusers' EMAModel has it: early
steps, which are far from the last, are forgotten soon. Where weights are spread over processes,
each averages its own parts; saved and exported they are whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from trainer import sharding

FILE = "ema.safetensors"
WRAPPED = "_checkpoint_wrapped_module."  # in names, where FSDP computes activations again


def average_of(ema: Ema | None) -> AbstractContextManager[None]:
    """The model has the average for its weights meanwhile, where there is one."""
    return nullcontext() if ema is None else ema.applied()


class Ema:
    """The average, in float32, of the weights of `model`, on its device, from now on. All
    processes call its methods."""

    def __init__(self, model: nn.Module, decay: float, power: float) -> None:
        self._model, self._decay, self._power, self._steps = model, decay, power, 0
        self._weights = {
            name.replace(WRAPPED, ""): weight
            for name, weight in model.named_parameters()
            if weight.requires_grad
        }
        self._average = [
            sharding.part(weight).to(torch.float32, copy=True) for weight in self._weights.values()
        ]

    @torch.no_grad()
    def update(self) -> None:
        """Takes the weights in, after a step."""
        self._steps += 1
        decay = min(self._decay, 1 - self._steps**-self._power)
        now = [sharding.part(weight).float() for weight in self._weights.values()]
        torch._foreach_lerp_(self._average, now, 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The average stands in the model in place of the weights, which come back after it; both
        bit for bit."""
        weights = list(self._weights.values())
        rounded = {  # as weights of less precision are, where the average stands in their place
            number: average.to("cpu", copy=True)
            for number, average in enumerate(self._average)
            if weights[number].dtype != average.dtype
        }
        self._swap()
        try:
            yield
        finally:
            self._swap()
            for number, average in rounded.items():
                self._average[number].copy_(average)

    @torch.no_grad()
    def _swap(self) -> None:
        """Weights and averages change places, one after the other: a large model's are not to be
        held three times."""
        sharding.reshard(self._model)
        for weight, average in zip(self._weights.values(), self._average, strict=True):
            trained = sharding.part(weight).clone()
            sharding.put(weight, average)
            average.copy_(trained)

    def state(self) -> dict[str, Tensor]:
        """The average, by the names of the weights, whole; of the first process, the others' is
        empty."""
        found = {}
        for (name, weight), value in zip(self._weights.items(), self._average, strict=True):
            made = sharding.whole(weight, value)
            if sharding.first():
                found[name] = made if made is value else made.cpu()
        return found

    def save(self, folder: Path) -> None:
        state = self.state()
        if state:
            values = {name: value.contiguous() for name, value in state.items()}
            save_file(values, folder / FILE, {"steps": str(self._steps)})

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        with safe_open(folder / FILE, "pt") as file:
            self._steps = int(file.metadata()["steps"])
            for (name, weight), value in zip(self._weights.items(), self._average, strict=True):
                value.copy_(sharding.cut(weight, file.get_tensor(name)))
