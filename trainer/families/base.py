"""What the families have in common: where the network comes from, what it must fit, its export."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from manifests import hub
from trainer import lora
from trainer.config import FamilySettings, ModelConfig, SettingsError

TIMESTEPS = 1000  # the time scale of them all
OTHERS = ("*.fp16.*", "*.bf16.*", "*.non_ema.*")  # copies of the weights in a hub's repository


class Family(nn.Module):
    """A network `net` of diffusers.

    Latents (B, C, F, H, W), times (B,) in [0, 1], text embeddings (B, L, values) and which tokens
    are there (B, L) to an output like the latents. `first`, for families that go on from a
    picture, are the latents (B, C, 1, H, W) of the first frames, and `told` (B,) which clips are
    told theirs.
    """

    kind: ClassVar[str]
    network: ClassVar[str]  # the class of diffusers
    pipeline: ClassVar[str]  # the class whose `load_lora_weights` reads the adapters
    part: ClassVar[str] = "transformer"  # of a pipeline: the folder, and the adapters' prefix
    objectives: ClassVar[frozenset[str]] = frozenset({"flow"})  # of pretrained weights
    blocks: ClassVar[tuple[str, ...]] = ()  # what FSDP gathers at a time, if diffusers doesn't say
    targets: ClassVar[tuple[str, ...]] = ("to_q", "to_k", "to_v", "to_out.0")  # of LoRA
    from_picture: ClassVar[bool] = False
    # A frame that is told stands in the latents, without noise, and is no part of the loss.
    clean_frame: ClassVar[bool] = False

    def __init__(self, net: nn.Module, config: ModelConfig) -> None:
        super().__init__()
        self.net = net
        there = {type(module).__name__ for module in net.modules()}
        blocks = getattr(net, "_no_split_modules", None) or self.blocks
        self._no_split_modules = [name for name in blocks if name in there]  # accelerate's name
        self.arch: Any = net.config
        self.latents = config.latents
        assert isinstance(config.model, FamilySettings)
        self.settings: FamilySettings = config.model
        self.check(config)
        if (chosen := config.model.lora) is not None:
            net.requires_grad_(False)
            lora.add(net, chosen, self.targets)

    # ------------------------------------------------------------------------- what differs

    @property
    def patch(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns of a token."""
        raise NotImplementedError

    @property
    def text_width(self) -> int:
        """Values of a text token."""
        raise NotImplementedError

    @property
    def needs_picture(self) -> bool:
        """Whether it knows no videos without a picture."""
        return False

    def check_channels(self, channels: int) -> None:
        """Raises SettingsError where the network takes other latents."""
        self.refuse_channels(channels, self.arch.in_channels, self.arch.out_channels)

    def check_text(self, spec: dict[str, Any]) -> None:
        """Raises SettingsError where it was trained on text of another kind."""

    # ------------------------------------------------------------------------- where it comes from

    @classmethod
    def build(cls, config: ModelConfig) -> Self:
        settings = config.model
        assert isinstance(settings, FamilySettings)
        if settings.path is not None and (config.arch is None or settings.lora is not None):
            net = cls.pretrained(settings)
        else:
            net = cls.new(config.arch or settings.config)
        return cls(net, config)

    @classmethod
    def new(cls, arch: dict[str, Any]) -> nn.Module:
        """A network of new weights."""
        known = list(inspect.signature(diffusers_class(cls.network)).parameters)
        if unknown := [name for name in arch if name not in known and name[0] != "_"]:
            raise SettingsError(
                f"train.model.config.{unknown[0]} is unknown: {cls.network} of diffusers has "
                f"{', '.join(sorted(known))}"
            )
        try:
            net: nn.Module = diffusers_class(cls.network).from_config(arch)
        except (TypeError, ValueError, RuntimeError, ArithmeticError, NotImplementedError) as error:
            raise SettingsError(
                f"train.model.config does not make a {cls.network}: {_first(error)} Its keys are "
                "those of a config.json of that class of diffusers"
            ) from error
        return net

    @classmethod
    def pretrained(cls, settings: FamilySettings) -> nn.Module:
        arch, folder = cls.describe(settings)
        if (found := arch.get("_class_name")) != cls.network:
            raise SettingsError(
                f"{settings.path} holds a {found}, but train.model.kind is {cls.kind}, which is a "
                f"{cls.network}: set train.model.kind or train.model.path to the other's"
            )
        return load(cls.network, settings, folder)

    @classmethod
    def describe(cls, settings: FamilySettings) -> tuple[dict[str, Any], str | None]:
        """The config.json of what `path` names, and in which of its folders it is."""
        errors = []
        names = [settings.subfolder or cls.part, None]
        wanted = ["/".join(filter(None, (name, "config.json"))) for name in names]
        place = fetched(settings, wanted)
        for folder in names:
            try:
                options = {"subfolder": folder} if folder else {}
                arch = diffusers_class(cls.network).load_config(place, **options)
            except (OSError, ValueError) as error:
                errors.append(_first(error))
                continue
            return dict(arch), folder
        told = f"revision {settings.revision} of " * bool(settings.revision) + str(settings.path)
        raise SettingsError(
            f"train.model.path: no model in {told}: {errors[0]} It must be a folder or hub id of "
            f"a {cls.network}, or of a pipeline that has one in {cls.part}/"
        )

    @property
    def config(self) -> dict[str, Any]:
        """The network's config.json, to build it again."""
        known: dict[str, Any] = json.loads(self.net.to_json_string())  # type: ignore[operator]
        return {k: v for k, v in known.items() if not k.startswith("_")}

    # ------------------------------------------------------------------------- what it must fit

    def check(self, config: ModelConfig) -> None:
        """Raises SettingsError where latents, text or objective are not what the network takes."""
        if self.settings.path is not None and config.objective not in self.objectives:
            wanted = " or ".join(sorted(self.objectives))
            raise SettingsError(
                f"train.objective is {config.objective}, but {self.kind} was trained on {wanted}: "
                "set it so, or train from scratch with train.model.config in place of path"
            )
        if self.settings.first_frame and not self.from_picture:
            raise SettingsError(
                f"train.model.first_frame is {self.settings.first_frame}, but {self.kind} has no "
                "way to go on from a picture: leave it out, or set kind to cogvideox, wan or ltx"
            )
        self.check_channels(config.shape[0])
        if (spec := config.embeddings) is None:
            raise SettingsError(
                f"train.model.kind is {self.kind}, which reads text embeddings, but "
                f"train.text.kind is {config.text.kind}: set it to stored (the section `embed` "
                "of vidpipe.yaml makes them)"
            )
        if spec["width"] != self.text_width:
            raise SettingsError(
                f"{spec['encoder']} gives {spec['width']} values a text token, but this "
                f"{self.kind} takes {self.text_width}: set embed.model to the encoder that it was "
                "trained with"
            )
        self.check_text(spec)

    def refuse_channels(self, channels: int, takes: float, gives: float) -> None:
        if not (takes == gives == channels):
            raise SettingsError(
                f"the latents have {channels} channels ({self.latents['vae']}), but this "
                f"{self.kind} takes {takes:g} and gives {gives:g}: encode with the VAE that it was "
                "trained with, or choose another model"
            )

    def refuse_padding(self, spec: dict[str, Any], padding: str, length: int | None) -> None:
        """Raises SettingsError where captions were not embedded as the network saw them."""
        if spec["padding"] != padding:
            raise SettingsError(
                f"captions were embedded with padding {spec['padding']}, but {self.kind} takes "
                f"{padding}: set embed.padding so and `vidpipe run`"
            )
        if length is not None and spec["max_length"] != length:
            raise SettingsError(
                f"captions were embedded to {spec['max_length']} tokens, but {self.kind} takes "
                f"{length}: set embed.max_length so and `vidpipe run`"
            )

    def check_shape(self, shape: tuple[int, ...]) -> None:
        """Raises SettingsError where latents (C, F, H, W) cannot be cut into patches."""
        names = ("frames", "rows", "columns")
        for name, size, patch, scale in zip(
            names,
            shape[1:],
            self.patch,
            (None, self.latents["spatial"], self.latents["spatial"]),
        ):
            if size % patch == 0:
                continue
            remedy = (
                f"choose sampling.frames so that there are a multiple of {patch} latent frames"
                if scale is None
                else f"make sampling.size a multiple of {patch * scale} pixels"
            )
            raise SettingsError(
                f"latents of shape {list(shape)} have {size} {name}, but {self.kind} takes "
                f"patches of {patch}: {remedy}"
            )

    # ------------------------------------------------------------------------- while training

    def checkpoint(self) -> None:
        """Computes activations again in the backward pass rather than keeping them."""
        self.net.enable_gradient_checkpointing()  # type: ignore[operator]

    def halve(self, precision: str) -> None:
        """Keeps what adapters leave as it is in the half precision it is computed in, but for what
        diffusers keeps in float32."""
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
        kept = getattr(self.net, "_keep_in_fp32_modules", None) or ()
        for name, parameter in self.net.named_parameters():
            whole = parameter.requires_grad or any(part in kept for part in name.split("."))
            if dtype is not None and not whole:
                parameter.data = parameter.data.to(dtype)

    def with_first(self, x: Tensor, first: Tensor | None, told: Tensor | None) -> Tensor:
        """The latents, their first frame that of the picture where a clip is told it."""
        if first is None or told is None:
            return x
        start = torch.where(told.view(-1, 1, 1, 1, 1), first.to(x), x[:, :, :1])
        return torch.cat([start, x[:, :, 1:]], 2)

    def frame_times(self, x: Tensor, time: Tensor, told: Tensor) -> Tensor:
        """A time for each token (B, N): 0 for those of a first frame that is told."""
        frames, rows, columns = (size // p for size, p in zip(x.shape[2:], self.patch))
        times = time.view(-1, 1, 1, 1).repeat(1, frames, rows, columns)
        times[told, 0] = 0
        return times.flatten(1)

    # ------------------------------------------------------------------------- saved and loaded

    def export(self, state: dict[str, Tensor], folder: Path) -> None:
        """Writes what diffusers reads into `folder`: `PART/` for `from_pretrained(folder,
        subfolder=PART)`, or with LoRA the adapters alone, for `load_lora_weights(folder)`."""
        state = {k.removeprefix("net."): v for k, v in state.items()}
        if self.settings.lora is not None:
            lora.save(self.net, state, diffusers_class(self.pipeline), self.part, folder)
        else:
            save_network(self.net, state, folder / self.part)

    def restore(self, folder: Path) -> None:
        """Loads what `export` wrote."""
        if self.settings.lora is not None:
            lora.load(self.net, folder, self.part)
            return
        self.net.load_state_dict(load_network(self.network, folder / self.part))


def fetched(settings: FamilySettings, wanted: Sequence[str]) -> Path:
    """The folder that `path` names, or on the hub, with the files of `wanted`. Raises
    SettingsError."""
    path = str(settings.path)
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    if not hub.is_id(path):
        raise SettingsError(
            f"train.model.path: there is no folder {path}, and a hub id reads owner/name"
        )
    try:
        return hub.fetch(path, settings.revision, wanted, OTHERS)
    except hub.HubError as error:
        raise SettingsError(f"train.model.path: {error}") from error


def load(name: str, settings: FamilySettings, folder: str | None) -> nn.Module:
    """A network of diffusers in float32, all of whose weights are there. Raises SettingsError."""
    options = {"subfolder": folder} if folder else {}
    prefix = f"{folder}/" if folder else ""
    weights = "diffusion_pytorch_model*"
    files = ("config.json", f"{weights}.safetensors", f"{weights}.safetensors.index.json")
    place = fetched(settings, [prefix + file for file in files])
    try:
        net, info = diffusers_class(name).from_pretrained(
            place,
            torch_dtype=torch.float32,
            use_safetensors=True,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise SettingsError(
            f"train.model.path: {settings.path} cannot be loaded: {_first(error)}"
        ) from error
    if missing := info["missing_keys"]:
        raise SettingsError(
            f"train.model.path: {settings.path} lacks {len(missing)} weights of a {name}, "
            f"{min(missing)} among them: it is damaged or of another version"
        )
    made: nn.Module = net
    return made


def save_network(net: Any, state: dict[str, Tensor], folder: Path) -> None:
    """As `save_pretrained` does, with the weights of `state`: all of them in one file."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True)
    net.save_config(folder)
    state = {name: value.contiguous() for name, value in state.items()}
    save_file(state, folder / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})


def load_network(name: str, folder: Path) -> dict[str, Tensor]:
    """The weights of what `save_network` wrote."""
    state: dict[str, Tensor] = diffusers_class(name).from_pretrained(folder).state_dict()
    return state


def diffusers_class(name: str) -> Any:
    import diffusers  # seconds to import

    return getattr(diffusers, name)


def _first(error: BaseException) -> str:
    """The first line of an error, as a sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".") + "."
