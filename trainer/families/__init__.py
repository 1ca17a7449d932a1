"""Video networks of diffusers behind the trainer's one interface, a file each."""

from __future__ import annotations

from trainer.config import FamilySettings, ModelConfig
from trainer.families.base import Family
from trainer.families.cogvideox import CogVideoX
from trainer.families.ltx import LTX
from trainer.families.unet3d import UNet3D
from trainer.families.wan import Wan

__all__ = ["FAMILIES", "Family", "build"]

FAMILIES: dict[str, type[Family]] = {
    "unet3d": UNet3D,
    "cogvideox": CogVideoX,
    "wan": Wan,
    "ltx": LTX,
}


def build(config: ModelConfig) -> Family:
    """The network that `config` describes: with the weights of `model.path`, or new ones from
    torch's global generator. Raises SettingsError where it cannot be had or does not fit."""
    assert isinstance(config.model, FamilySettings)
    return FAMILIES[config.model.kind].build(config)
