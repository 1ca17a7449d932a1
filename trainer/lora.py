"""Low-rank adapters (Hu 2021) by peft, saved as diffusers' pipelines load them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from trainer.config import LoraSettings, SettingsError

NAME = "default"  # peft's, of the one adapter there is
FILE = "pytorch_lora_weights.safetensors"
_ADAPTER = re.compile(r"\.(lora_[AB])\.")


def add(net: nn.Module, settings: LoraSettings, targets: tuple[str, ...]) -> None:
    """Puts new adapters, which change nothing yet, on layers of a frozen network.

    Raises SettingsError without peft, or where the network has no such layers.
    """
    peft = _peft()
    chosen = list(settings.targets or targets)
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha or settings.rank,
        lora_dropout=settings.dropout,
        target_modules=chosen,
        init_lora_weights=True,
    )
    try:
        peft.inject_adapter_in_model(config, net, NAME)
    except ValueError as error:
        linear = {n.split(".")[-1] for n, m in net.named_modules() if isinstance(m, nn.Linear)}
        raise SettingsError(
            f"train.model.lora.targets is {chosen}: {str(error).splitlines()[0].rstrip('.')}. "
            f"Linear layers end in {', '.join(sorted(linear))}"
        ) from error


def is_adapter(name: str) -> bool:
    """Whether a weight is an adapter's, by its name in a state."""
    return _ADAPTER.search(name) is not None


def original(name: str) -> str:
    """A weight's name before there were adapters."""
    return name.replace(".base_layer.", ".")


def merged(state: dict[str, Tensor], scale: float) -> dict[str, Tensor]:
    """The state of a network without adapters that does what one with them does: W + scale B A."""
    found = {original(k): v for k, v in state.items() if not is_adapter(k)}
    for key, down in state.items():
        if f".lora_A.{NAME}." not in key:
            continue
        up, name = state[key.replace(".lora_A.", ".lora_B.")], key.replace(f".lora_A.{NAME}.", ".")
        found[name] = found[name] + scale * (up.flatten(1) @ down.flatten(1)).view_as(found[name])
    return found


def save(net: Any, state: dict[str, Tensor], pipeline: Any, part: str, folder: Path) -> None:
    """Writes the adapters of `state` and their settings, for `pipeline.load_lora_weights`."""
    layers = {k.replace(f".{NAME}.", "."): v for k, v in state.items() if is_adapter(k)}
    pipeline.save_lora_weights(
        folder,
        **{
            f"{part}_lora_layers": {k: v.contiguous() for k, v in layers.items()},
            f"{part}_lora_adapter_metadata": net.peft_config[NAME].to_dict(),
        },
    )


def load(net: nn.Module, folder: Path, part: str) -> None:
    """Loads what `save` wrote into a network that has such adapters."""
    from safetensors.torch import load_file

    state = {k.removeprefix(f"{part}."): v for k, v in load_file(folder / FILE).items()}
    state = {k.replace(".weight", f".{NAME}.weight"): v for k, v in state.items()}
    found = net.load_state_dict(state, strict=False)
    if missing := [name for name in found.missing_keys if is_adapter(name)]:
        raise SettingsError(f"{folder / FILE} lacks {missing[0]}: it is of another model")


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise SettingsError(
            "train.model.lora is set, but peft is not installed: pip install peft"
        ) from error
    return peft
