"""FSDP2 and DeepSpeed's ZeRO, as accelerate's configuration asks for them: what the trainer sees to
itself, and what a process holds of a weight that all of them hold together.

With FSDP2 a weight is a DTensor; with ZeRO-3 it is cut flat into equal parts (`ds_tensor`), the
last of them padded; with ZeRO-1 and 2, and without any of it, each process has all of it.
"""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, PartialState
from accelerate.utils import DeepSpeedPlugin, DistributedType, parse_flag_from_env
from torch import Tensor, nn

from trainer.config import SettingsError, TrainSettings

Weight = Any  # an nn.Parameter, with what DeepSpeed adds to it

WHOLE = "each process has all weights"
# What accelerate calls the files and folders of a checkpoint.
FSDP_PARTS, FSDP_WHOLE, ZERO = "pytorch_model_fsdp_0", "pytorch_model_fsdp.bin", "pytorch_model"


# ----------------------------------------------------------------------------- what is started


def join() -> PartialState:
    """Joins the run's other processes, on CPUs where `ACCELERATE_USE_CPU` says so.

    accelerate has FSDP and DeepSpeed for GPUs alone: on CPUs it leaves the one out without a word,
    and cannot start the other. Both do over gloo.
    """
    cpu = parse_flag_from_env("ACCELERATE_USE_CPU")
    if cpu and parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        os.environ["DS_ACCELERATOR"] = "cpu"
        del os.environ["ACCELERATE_USE_CPU"]  # accelerate would train without DeepSpeed
        return PartialState(backend="gloo")
    state = PartialState(cpu=cpu)
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        # A model's output may be a view; nobody writes into it.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")
        if state.distributed_type is DistributedType.MULTI_CPU:
            PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return state


def deepspeed(settings: TrainSettings) -> DeepSpeedPlugin | None:
    """DeepSpeed with what `settings` say of a step, in place of what its configuration says."""
    if not parse_flag_from_env("ACCELERATE_USE_DEEPSPEED"):
        return None
    plugin = DeepSpeedPlugin()
    config = plugin.deepspeed_config
    config["train_micro_batch_size_per_gpu"] = settings.batch_size
    config["gradient_accumulation_steps"] = settings.gradient_accumulation
    config["gradient_clipping"] = settings.grad_clip or 0.0
    config["train_batch_size"] = "auto"
    config.setdefault("fp16", {"enabled": "auto", "auto_cast": False})  # see `ready`
    # Without it there is no model to write at the end.
    config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] = True
    return plugin


def ready(accelerator: Accelerator, model: nn.Module) -> None:
    """To be called before a model is prepared. Raises SettingsError for FSDP 1.

    In half precision FSDP2 and DeepSpeed cast weights, and would cast a model's inputs, times among
    them; accelerate leaves autocast out. Here the model computes under autocast, as without them,
    its inputs and output as they are; gradients are summed up in float32 (FSDP2).
    """
    if accelerator.distributed_type is DistributedType.FSDP and not accelerator.is_fsdp2:
        raise SettingsError(
            "accelerate's configuration asks for FSDP 1: set fsdp_version: 2 under fsdp_config "
            "(`accelerate to-fsdp2 --config_file FILE --overwrite` rewrites it)"
        )
    if zero_stage(accelerator) == 3:
        # These take weights of modules within without calling these, and others than in training
        # where they only look: ZeRO-3, which gathers what is called in the order that it has seen,
        # is to gather the whole layer.
        from deepspeed.utils import set_z3_leaf_modules

        set_z3_leaf_modules(model, [nn.TransformerEncoderLayer], raise_if_not_found=False)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision)
    if dtype is None or kind(accelerator) == WHOLE:
        return
    if accelerator.is_fsdp2:
        from torch.distributed.fsdp import MixedPrecisionPolicy

        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    forward = model.forward

    def computed(*inputs: Any) -> Tensor:
        with torch.autocast(accelerator.device.type, dtype):
            made: Tensor = forward(*inputs)
        return made.float()

    model.forward = computed


def kind(accelerator: Accelerator) -> str:
    """In words, how weights are spread over processes: checkpoints of two kinds are different."""
    if accelerator.distributed_type is DistributedType.DEEPSPEED:
        return f"DeepSpeed's ZeRO-{zero_stage(accelerator)} spreads them"
    if accelerator.distributed_type is DistributedType.FSDP:
        return f"FSDP2 spreads them, {accelerator.state.fsdp_plugin.state_dict_type.name}"
    return WHOLE


def zero_stage(accelerator: Accelerator) -> int | None:
    """DeepSpeed's; None without it."""
    if accelerator.distributed_type is not DistributedType.DEEPSPEED:
        return None
    return int(accelerator.state.deepspeed_plugin.zero_stage)


# ----------------------------------------------------------------------------- parts of weights


def first() -> bool:
    """Whether this is the first process."""
    return not dist.is_initialized() or dist.get_rank() == 0


def part(weight: Weight) -> Tensor:
    """What this process holds of a weight, in place: its shard, or all of it."""
    held = (weight.ds_tensor if _cut_flat(weight) else weight).detach()
    local: Tensor = held.to_local() if _is_dtensor(held) else held
    return local


def whole(weight: Weight, held: Tensor) -> Tensor:
    """What the parts `held` by all processes make, in the weight's shape. All call it."""
    if _is_dtensor(weight):
        from torch.distributed.tensor import DTensor

        mesh, shape, stride = weight.device_mesh, weight.shape, weight.stride()
        made = DTensor.from_local(held, mesh, weight.placements, shape=shape, stride=stride)
        return made.full_tensor()
    if _cut_flat(weight):
        from deepspeed.accelerator import get_accelerator

        group = weight.ds_process_group
        held = held.to(get_accelerator().current_device_name()).contiguous()
        flat = held.new_empty(dist.get_world_size(group) * held.numel())
        dist.all_gather_into_tensor(flat, held, group=group)
        return flat[: weight.ds_numel].view(weight.ds_shape)
    return held


def cut(weight: Weight, value: Tensor) -> Tensor:
    """The part of `value`, in the weight's shape, that this process holds."""
    if _is_dtensor(weight):
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(
            value.to(weight.device), weight.device_mesh, weight.placements, src_data_rank=None
        ).to_local()
    if _cut_flat(weight):
        size, rank = weight.ds_tensor.numel(), dist.get_rank(weight.ds_process_group)
        flat = value.flatten()[rank * size : (rank + 1) * size]
        return nn.functional.pad(flat, (0, size - len(flat)))
    return value


def put(weight: Weight, held: Tensor) -> None:
    """Makes `held` what this process holds of a weight. All call it."""
    if not _cut_flat(weight):
        part(weight).copy_(held)
        return
    from deepspeed import zero

    value = whole(weight, held)
    with zero.GatheredParameters([weight], modifier_rank=0):
        if first():
            weight.data.copy_(value)


def reshard(model: nn.Module) -> None:
    """Gives up whole weights that FSDP2 keeps from a pass without gradients: what is put into their
    parts would not be seen."""
    loaded: Any = sys.modules.get("torch.distributed.fsdp")
    for module in model.modules() if loaded else ():
        if isinstance(module, loaded.FSDPModule):
            module.reshard()


# ----------------------------------------------------------------------------- parts in files


def holds(folder: Path) -> bool:
    """Whether `folder` is a checkpoint of weights that were spread."""
    return any((folder / name).exists() for name in (FSDP_PARTS, FSDP_WHOLE, ZERO))


def saved(folder: Path, like: dict[str, Tensor]) -> dict[str, Tensor]:
    """The whole weights of such a checkpoint: those named in `like`, of its shapes, or with
    DeepSpeed those that it holds, in float32. Raises SettingsError where DeepSpeed is missing."""
    if (folder / FSDP_PARTS).exists():
        from torch.distributed.checkpoint.state_dict_loader import load

        state = {"model": {name: torch.empty_like(value) for name, value in like.items()}}
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # as it should be
            load(state, checkpoint_id=folder / FSDP_PARTS, no_dist=True)
        return state["model"]
    if (folder / FSDP_WHOLE).exists():
        found: dict[str, Tensor] = torch.load(
            folder / FSDP_WHOLE, map_location="cpu", weights_only=True
        )
        return found
    try:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    except ImportError as error:
        raise SettingsError(
            f"{folder} was saved by DeepSpeed, which is not installed: "
            "pip install 'vidpipe[deepspeed]'"
        ) from error
    weights: dict[str, Tensor] = get_fp32_state_dict_from_zero_checkpoint(str(folder), ZERO)
    return weights


def _is_dtensor(value: Any) -> bool:
    """Whoever has one has loaded its module, which takes half a second of CPU: a training that
    spreads no weights starts without."""
    loaded: Any = sys.modules.get("torch.distributed.tensor")
    return loaded is not None and isinstance(value, loaded.DTensor)


def _cut_flat(weight: Weight) -> bool:
    return hasattr(weight, "ds_tensor")
