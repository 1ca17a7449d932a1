"""The settings of `vidpipe train`: the section `train` of vidpipe.yaml, typed.

The pipeline hands the section on as JSON, with `index` and `output` added, and does not judge it:
here is the one place that knows what is allowed. No torch in this file, so that it imports fast.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import BaseModel, Field, ValidationError, model_validator

from trainer.sections import (
    MODELS,
    DiTSettings,
    Expect,
    FamilySettings,
    LoraSettings,
    Model,
    SamplesSettings,
    Section,
    SettingsError,
    TextSettings,
    ValidationSettings,
)

__all__ = [
    "DiTSettings",
    "Expect",
    "FamilySettings",
    "LoraSettings",
    "ModelConfig",
    "SamplesSettings",
    "SettingsError",
    "TextSettings",
    "TrainSettings",
    "ValidationSettings",
    "load_settings",
    "parse_settings",
]


class TrainSettings(Section):
    """Everything that decides a training run."""

    index: str = Field(description="URL of the index that `vidpipe run` writes")
    output: Path = Field(description="folder of checkpoints, logs and the trained model")

    steps: int = Field(1000, ge=1, description="optimiser steps of the whole run")
    batch_size: int = Field(8, ge=1, description="clips of one process in one forward pass")
    gradient_accumulation: int = Field(1, ge=1, description="forward passes that make one step")
    optimizer: Literal["adamw", "adamw_8bit", "adamw_offload", "prodigy"] = Field(
        "adamw",
        description="adamw (fused); adamw_8bit: its state in 8 bits (bitsandbytes); "
        "adamw_offload: its state and step on the CPU (torchao), on one GPU and without "
        "grad_clip; prodigy: finds the rate itself (prodigyopt)",
    )
    learning_rate: float = Field(1e-3, gt=0, description="after the warm-up; prodigy's is 1")
    lr_schedule: Literal["constant", "cosine"] = Field(
        "constant", description="of the rate after the warm-up; cosine: to 0 at the last step"
    )
    warmup: int = Field(50, ge=0, description="steps over which the rate rises from 0")
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.99), description="of the optimiser's averages: gradients, and their squares"
    )
    weight_decay: float = Field(0.01, ge=0, description="of matrices only")
    grad_clip: float | None = Field(
        1.0, gt=0, description="the gradient's norm is cut to this; null: not at all"
    )
    ema_decay: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="keeps a moving average of the weights, which samples and the trained model "
        "are of: its largest decay, 0.9999 say",
    )
    ema_power: float = Field(
        2 / 3,
        gt=0,
        le=1,
        description="the average's decay after n steps is at most 1 - (1 + n) ** -power; 3/4 for "
        "short runs, 1: the plain mean",
    )
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = Field(
        "auto", description="auto: bf16 on a GPU that has it, else no"
    )
    gradient_checkpointing: bool = Field(
        False, description="computes activations twice rather than keep them: less memory, slower"
    )
    compile: bool = Field(False, description="compiles the model (torch.compile), per shape")
    seed: int = Field(0, ge=0, lt=2**63, description="of weights, order, noise and dropout")

    objective: Literal["epsilon", "v_prediction", "flow"] = Field(
        "flow", description="what the model predicts"
    )
    schedule: Literal["scaled_linear", "cosine"] = Field(
        "scaled_linear", description="noise schedule of epsilon and v_prediction"
    )
    timesteps: Literal["auto", "uniform", "logit_normal"] = Field(
        "auto", description="density of timesteps; auto: logit_normal for flow, else uniform"
    )
    timestep_mean: float = Field(
        0.0, ge=-5, le=5, description="of logit_normal: its normal's; above 0: more noise"
    )
    timestep_std: float = Field(1.0, gt=0, le=5, description="of logit_normal: its normal's")
    shift: float = Field(
        1.0,
        gt=0,
        le=1000,
        description="moves timesteps towards noise: 3 for SD3 and for Wan at 480p, 5 for Wan at "
        "720p; 1: not at all",
    )
    shift_tokens: tuple[tuple[int, float], tuple[int, float]] | None = Field(
        None,
        description="the shift by the model's tokens of a clip, in place of `shift`: two pairs of "
        "tokens and log(shift), on the line between them in between. Flux has [[256, 0.5], "
        "[4096, 1.15]], LTX [[1024, 0.95], [4096, 2.05]]",
    )
    zero_terminal_snr: bool = Field(
        False,
        description="of v_prediction: the schedule's last step holds no signal, as sampling's "
        "first (Lin 2023)",
    )
    snr_shift: float = Field(
        1.0,
        gt=0,
        description="of epsilon and v_prediction: the schedule's SNR is divided by it; "
        "CogVideoX-2b was trained with 3, the others with 1",
    )
    loss_weight: Literal["none", "snr", "min_snr"] = Field(
        "none",
        description="of epsilon and v_prediction: the loss' factor in terms of x0's error over "
        "the target's: snr, or min_snr, snr cut at min_snr_gamma (Hang 2023)",
    )
    min_snr_gamma: float | None = Field(None, gt=0, description="of min_snr; default: 5")
    caption_dropout: float = Field(
        0.1, ge=0, le=1, description="share of visits without caption, for guidance"
    )
    captions: dict[str, Annotated[float, Field(ge=0)]] = Field(
        default_factory=dict,
        description="weights by which a visit draws among a clip's captions: "
        "{short: 1, medium: 2, caption: 1}; default: always `caption`, the index's own",
    )

    shuffle_window: int = Field(
        1024, ge=1, description="clips shuffled together, after shards are; fewer, see `memory`"
    )
    memory: int = Field(
        4 << 30,
        ge=1 << 20,
        description="bytes of latents and embeddings that a process holds ahead of the model, "
        "counted as float32; no more than an eighth of it is shuffled together",
    )
    lanes: int = Field(
        16,
        ge=1,
        le=1024,
        description="stretches of the shards that are read side by side; where it is a multiple of "
        "the number of processes, each reads shards of its own",
    )
    read_ahead: int = Field(4, ge=1, description="batches made ready ahead of the model")
    save_every: int = Field(500, ge=1, description="steps between checkpoints")
    log_every: int = Field(10, ge=1, description="steps between lines on the console")
    keep: int = Field(3, ge=1, description="newest checkpoints that are kept")
    trackers: tuple[Literal["tensorboard", "wandb", "trackio"], ...] = Field(
        ("tensorboard",), description="what is told beside the console, and shown samples"
    )
    project: str = Field("vidpipe", min_length=1, description="of the trackers")
    run_name: str | None = Field(
        None, description="in wandb and trackio; default: the output folder's name and a number"
    )

    model: Model = Field(default_factory=DiTSettings, description="the model")
    text: TextSettings = Field(default_factory=TextSettings, description="the captions")
    expect: Expect = Field(default_factory=Expect, description="checks against the index")
    validation: ValidationSettings = Field(
        default_factory=ValidationSettings, description="clips that are held back"
    )
    samples: SamplesSettings = Field(
        default_factory=SamplesSettings, description="videos of fixed prompts while it trains"
    )

    @model_validator(mode="after")
    def _agrees(self) -> Self:
        self._check_objective()
        if self.optimizer == "prodigy" and self.learning_rate < 0.1:
            raise ValueError(
                f"learning_rate is {self.learning_rate}, but prodigy finds the rate itself and "
                "multiplies it by this: set it to 1"
            )
        if self.optimizer == "adamw_offload" and self.grad_clip is not None:
            raise ValueError(
                "optimizer is adamw_offload, which has taken gradients to the CPU before they can "
                "be clipped: set grad_clip to null, or optimizer to adamw_8bit"
            )
        if self.optimizer == "adamw_offload" and self.mixed_precision == "fp16":
            raise ValueError(
                "optimizer is adamw_offload, which does not unscale gradients of fp16: set "
                "mixed_precision to bf16"
            )
        many = self.samples.prompts
        if isinstance(many, int) and many and not self.validation.share:
            raise ValueError(
                f"samples.prompts is {many}, which are captions of clips that are held back, but "
                "validation.share is 0: set it, or list prompts"
            )
        if self.captions and not any(self.captions.values()):
            raise ValueError(
                f"captions is {self.captions}: one of the weights must be above 0, or leave it out"
            )
        if self.captions and self.text.kind == "stored":
            raise ValueError(
                "captions are drawn by weights, but text.kind is stored and embeddings are of one "
                "caption a clip: leave captions out, or set text.kind to words or bytes"
            )
        return self

    def _check_objective(self) -> None:
        flow = self.objective == "flow"
        if flow and self.loss_weight != "none":
            raise ValueError(
                f"loss_weight is {self.loss_weight}, but flow matching has no SNR weighting: set "
                "it to none (timesteps logit_normal does what it is for), or objective to epsilon "
                "or v_prediction"
            )
        if self.min_snr_gamma is not None and self.loss_weight != "min_snr":
            instead = "leave it out" if flow else "set loss_weight to min_snr, or leave it out"
            raise ValueError(
                f"min_snr_gamma is {self.min_snr_gamma}, but loss_weight is {self.loss_weight}: "
                f"{instead}"
            )
        if self.snr_shift != 1 and flow:
            raise ValueError(
                f"snr_shift is {self.snr_shift}, but flow matching has no schedule: set shift "
                f"to {math.sqrt(self.snr_shift):.3g}, which does the same"
            )
        if self.zero_terminal_snr and flow:
            raise ValueError(
                "zero_terminal_snr is set, but flow matching ends in pure noise anyway: leave it "
                "out, or set objective to v_prediction"
            )
        if self.zero_terminal_snr and self.objective == "epsilon":
            raise ValueError(
                "zero_terminal_snr is set, but epsilon says nothing about the clip where there is "
                "no signal: set objective to v_prediction, or leave it out"
            )
        if self.shift_tokens is None:
            return
        (few, _), (many, _) = self.shift_tokens
        if not 0 < few < many:
            raise ValueError(
                f"shift_tokens is {[list(pair) for pair in self.shift_tokens]}: the first pair "
                "must have fewer tokens than the second, and more than 0"
            )
        if self.shift != 1:
            raise ValueError(
                f"shift is {self.shift}, but shift_tokens says it too: leave one of them out"
            )

    @property
    def density(self) -> Literal["uniform", "logit_normal"]:
        """The density of timesteps, with `auto` resolved."""
        if self.timesteps == "auto":
            return "logit_normal" if self.objective == "flow" else "uniform"
        return self.timesteps


class ModelConfig(Section):
    """What a saved model is, beside its weights: `config.json` of a checkpoint and of an export."""

    model: Model = Field(description="the model's family and sizes")
    text: TextSettings = Field(description="the text encoder's sizes")
    objective: Literal["epsilon", "v_prediction", "flow"] = Field(description="what it predicts")
    schedule: Literal["scaled_linear", "cosine"] = Field(description="its noise schedule")
    zero_terminal_snr: bool = Field(False, description="whether that ends without any signal")
    snr_shift: float = Field(1.0, description="what its SNR is divided by")
    shift: float = Field(1.0, description="of flow: how far times were moved towards noise")
    shape: tuple[int, int, int, int] = Field(description="C, F, H, W of latents it was trained on")
    latents: dict[str, Any] = Field(description="their LatentSpec: VAE, shift, scale, sampling")
    embeddings: dict[str, Any] | None = Field(
        None, description="the TextSpec of stored embeddings: encoder, width, length"
    )

    arch: dict[str, Any] | None = Field(
        None, description="of a network of diffusers: its own config.json"
    )

    def differences(self, other: ModelConfig) -> list[str]:
        """Why weights of `other` do not fit: "model.width is 128, not 256". Empty: they do."""
        names = ("vae_sha256", "channels", "shift", "scale")
        texts = ("encoder_sha256", "width", "padding")
        ours, theirs = (
            {
                **_named(config.model),
                **{f"model.config.{k}": v for k, v in (config.arch or {}).items()},
                **{
                    f"text.{k}": v
                    for k, v in config.text
                    if k == "kind" or config.embeddings is None  # nothing else has a say then
                },
                "objective": config.objective,
                "schedule": config.schedule if config.objective != "flow" else None,
                "zero_terminal_snr": config.zero_terminal_snr,
                "snr_shift": config.snr_shift,
                **{f"latents.{k}": config.latents[k] for k in names},
                **{f"embeddings.{k}": (config.embeddings or {}).get(k) for k in texts},
            }
            for config in (self, other)
        )
        keys = dict.fromkeys([*ours, *theirs])
        pairs = {key: (ours.get(key), theirs.get(key)) for key in keys}
        return [f"{key} is {one}, not {two}" for key, (one, two) in pairs.items() if one != two]


def _named(model: DiTSettings | FamilySettings) -> dict[str, Any]:
    """What of a model's settings decides which weights fit, by their keys."""
    values = {k: v for k, v in model if k not in ("config", "first_frame", "lora")}
    lora = getattr(model, "lora", None)
    if lora is not None:
        values |= {"lora.rank": lora.rank, "lora.scale": lora.scale, "lora.targets": lora.targets}
    return {f"model.{k}": v for k, v in values.items()}


def load_settings(path: str | Path) -> TrainSettings:
    """Reads the JSON file that the pipeline wrote. Raises SettingsError."""
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"the settings {path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise SettingsError(f"the settings {path} are no JSON: {error}") from error
    return parse_settings(values)


def parse_settings(values: Any) -> TrainSettings:
    """Raises SettingsError that says all that is wrong, one line each."""
    try:
        return TrainSettings.model_validate(values)
    except ValidationError as error:
        raise SettingsError("\n".join(_sentence(dict(e)) for e in error.errors())) from error


def _sentence(error: dict[str, Any]) -> str:
    *parents, key = [str(part) for part in error["loc"]] or [""]
    named = [part for part in (*parents, key) if part not in MODELS]
    name = ".".join(["train", *named]).rstrip(".")
    reason = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if error["type"] == "extra_forbidden":
        allowed = list(_fields(parents))
        near = difflib.get_close_matches(key, allowed, n=1)
        guess = f"did you mean {near[0]}? " if near else ""
        return f"{name} is unknown: {guess}allowed are {', '.join(allowed)}"
    if error["type"] == "missing":
        return f"{name} is missing: {_fields(parents)[key].description}"
    if error["type"] == "value_error":
        return f"{name}: {reason}"
    guess = ""
    if error["type"] == "literal_error":
        allowed = re.findall(r"'([^']+)'", error["ctx"]["expected"])
        near = difflib.get_close_matches(str(error["input"]).lower(), allowed, n=1)
        guess = f". Did you mean {near[0]}?" if near else ""
    return f"{name} is {json.dumps(error['input'], default=str)}: it must be {reason}{guess}"


def _fields(parents: list[str]) -> dict[str, Any]:
    """The fields of the section that the keys `parents` lead to."""
    section: type[BaseModel] = TrainSettings
    for part in parents:
        if part in MODELS:
            section = MODELS[part]
        elif part != "model":
            annotation = section.model_fields[part].annotation
            inner = [one for one in get_args(annotation) if one is not type(None)]
            section = inner[0] if inner else annotation  # type: ignore[assignment]
    return dict(section.model_fields)
