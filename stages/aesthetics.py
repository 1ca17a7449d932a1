"""LAION's aesthetic predictors: a linear function of a picture's CLIP feature.

The improved predictor (christophschuhmann/improved-aesthetic-predictor) is an MLP without
activations, so it is one affine map, and so is LAION-AI/aesthetic-predictor. Both take the
projected image feature of OpenAI's CLIP, divided by its length. Needs torch and transformers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.base import Failed, StageError
from stages.devices import usable
from stages.media.picture import Pixels
from stages.models import check_weights
from stages.vae.halving import Halving, whole

if TYPE_CHECKING:
    import torch

# How OpenAI's CLIP models want pixels, and so every head trained on them.
MEAN = (0.48145466, 0.4578275, 0.40821073)
STD = (0.26862954, 0.26130258, 0.27577711)
# The MLP's linear layers by their place in its nn.Sequential: dropout between, nothing else.
LINEAR_MLP = [0, 2, 4, 6, 7]


class Aesthetics:
    """A CLIP model and the head on it, loaded on a device. Raises StageError where they don't
    fit together."""

    def __init__(self, clip: str, head: str, device: str = "auto", pictures: int = 64) -> None:
        import torch
        from transformers import CLIPModel

        self.device, self.pictures = usable(device), pictures
        self._halving = Halving()
        model, loading = CLIPModel.from_pretrained(
            clip, dtype=torch.float32, output_loading_info=True
        )
        check_weights(model, loading, clip)
        self.clip: Any = model.to(self.device).eval()
        self.side = int(model.config.vision_config.image_size)
        weight, bias = head_of(load(head), head)
        width = int(model.config.projection_dim)
        if width != len(weight):
            raise StageError(
                f"aesthetic_head {head} takes features of {len(weight)} numbers and the CLIP model"
                f" gives {width}: use the CLIP that it was trained on"
            )
        self.weight, self.bias = weight.to(self.device), bias.to(self.device)

    def prepared(self, frames: Pixels) -> torch.Tensor:
        """RGB [n, height, width, 3] as CLIP takes it: float32 [n, 3, side, side]; the short side
        scaled (bicubic), the centre cut out."""
        import torch

        pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).float()
        height, width = pixels.shape[2:]
        ratio = self.side / min(height, width)
        size = max(self.side, round(height * ratio)), max(self.side, round(width * ratio))
        pixels = torch.nn.functional.interpolate(pixels, size, mode="bicubic", antialias=True)
        top, left = (size[0] - self.side) // 2, (size[1] - self.side) // 2
        pixels = pixels[:, :, top : top + self.side, left : left + self.side].clamp(0, 255) / 255
        mean, std = torch.tensor(MEAN), torch.tensor(STD)
        return (pixels - mean[:, None, None]) / std[:, None, None]

    def scores(self, clips: list[torch.Tensor]) -> list[float | Failed]:
        """The mean score of each clip's prepared frames; all of them go through CLIP together.
        Failed for a clip with a frame that the device's memory does not hold, alone."""
        import torch

        def scores(part: torch.Tensor) -> torch.Tensor:
            seen = self.clip.get_image_features(pixel_values=part.to(self.device)).pooler_output
            return predicted(seen, self.weight, self.bias).cpu()

        with torch.inference_mode():
            found = iter(self._halving(scores, torch.cat(clips), self.pictures))
        return [
            whole(list(islice(found, len(clip))), lambda parts: float(torch.stack(parts).mean()))
            for clip in clips
        ]


def predicted(features: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """Scores [n] of CLIP features [n, width] of any length."""
    import torch

    return torch.nn.functional.normalize(features, dim=-1) @ weight + bias


def load(path: str) -> dict[str, torch.Tensor]:
    """The weights in a .pth or .safetensors file. Raises StageError where it holds others."""
    import pickle

    import torch
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if Path(path).suffix == ".safetensors":
            state = load_file(path)
        else:  # a pickle tagged for the GPU that it was saved on
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        raise StageError(f"aesthetic_head {path} holds no weights that can be read") from error
    return {name: value.float() for name, value in state.items()}


def head_of(state: Mapping[str, torch.Tensor], path: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A head as one affine map: weight [width] and bias []. Raises StageError for others."""
    if set(state) == {"weight", "bias"}:
        return state["weight"][0], state["bias"][0]
    layers = sorted({int(n) for key in state for n in re.findall(r"layers\.(\d+)\.", key)})
    if layers != LINEAR_MLP:
        raise StageError(
            f"aesthetic_head {path} is neither LAION's linear head (weight, bias) nor its linear"
            f" MLP (layers {LINEAR_MLP}): it has {', '.join(sorted(state)[:4])}, ..."
        )
    # In double precision: the product of five layers must not lose what each of them holds.
    weight, bias = state["layers.7.weight"].double(), state["layers.7.bias"].double()
    for layer in reversed(LINEAR_MLP[:-1]):
        bias = weight @ state[f"layers.{layer}.bias"].double() + bias
        weight = weight @ state[f"layers.{layer}.weight"].double()
    return weight[0].float(), bias[0].float()
