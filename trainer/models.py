"""The models: a small video DiT, its text, and how a model is saved and loaded.

The DiT (Peebles & Xie 2023) cuts latents into patches of a few frames, rows and columns, puts text
tokens before them and attends over both; the time and the pooled text modulate every block by
adaLN-Zero. The networks of diffusers are in `families`.
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from trainer import ema, families, lora, sharding
from trainer.config import DiTSettings, FamilySettings, ModelConfig, TextSettings
from trainer.families import Family
from trainer.objectives import TIMESTEPS

WEIGHTS = "model.safetensors"  # the name that accelerate gives them in a checkpoint as well
CONFIG = "config.json"

Text = Tensor | tuple[Tensor, Tensor]  # token ids; stored embeddings and their mask

PAD, BEGIN, FIRST = 0, 1, 2  # token ids: padding, the caption's beginning, the first real one


def tokenise(captions: Sequence[str], settings: TextSettings) -> Tensor:
    """Token ids (B, L) int64, L the longest caption's; an empty caption is the token BEGIN alone.

    Words are lower-cased and hashed by CRC-32 into `buckets`: there is no vocabulary to keep, and
    two words rarely share a row.
    """
    rows = []
    for caption in captions:
        if settings.kind == "bytes":
            tokens = [FIRST + byte for byte in caption.encode()]
        else:
            words = re.findall(r"\w+", caption.lower())
            room = settings.buckets - FIRST
            tokens = [FIRST + zlib.crc32(word.encode()) % room for word in words]
        rows.append(torch.tensor([BEGIN, *tokens[: settings.length - 1]]))
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PAD)


class TextEncoder(nn.Module):
    """Token ids (B, L) to tokens (B, L, width), their mask (B, L) and the pooled text (B, width).

    A model knows no more of its text than these three, so `StoredText` may take this one's place.
    """

    def __init__(self, settings: TextSettings, width: int, heads: int) -> None:
        super().__init__()
        rows = settings.buckets if settings.kind == "words" else FIRST + 256
        self.embed = nn.Embedding(rows, width)
        self.place = nn.Parameter(torch.zeros(settings.length, width))
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, 0.0, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(settings.layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mask = ids != PAD
        x = self.embed(ids) + self.place[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x, src_key_padding_mask=~mask)
        x = self.norm(x)
        return x, mask, pooled(x, mask)


class StoredText(nn.Module):
    """Stored embeddings (B, L, values) and their mask (B, L) to the three of `TextEncoder`."""

    def __init__(self, values: int, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(values, width)
        self.second = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, stored: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        values, mask = stored
        x = F.gelu(self.first(values.to(self.first.weight.dtype)), approximate="tanh")
        x = self.norm(self.second(x))
        return x, mask, pooled(x, mask)


def pooled(x: Tensor, mask: Tensor) -> Tensor:
    """The mean (B, width) of the tokens (B, L, width) that are there."""
    share = mask.unsqueeze(-1).to(x.dtype)
    return (x * share).sum(1) / share.sum(1)


class Block(nn.Module):
    """A transformer block whose norms and gates are set by the condition: adaLN-Zero."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.qkv = nn.Linear(width, 3 * width)
        # Queries and keys of unit size keep attention in range in half precision (Dehghani 2023).
        self.q_norm = nn.RMSNorm(width // heads, eps=1e-6)
        self.k_norm = nn.RMSNorm(width // heads, eps=1e-6)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width)
        )
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, condition: Tensor, mask: Tensor) -> Tensor:
        """x (B, N, width); condition (B, width); mask (B, 1, 1, N), False: not attended to."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            self.modulation(condition).unsqueeze(1).chunk(6, -1)
        )
        x = x + gate1 * self.attend(self.norm1(x) * (1 + scale1) + shift1, mask)
        x = x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)
        return x

    def attend(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q.float()).to(v.dtype), self.k_norm(k.float()).to(v.dtype)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        out: Tensor = self.out(x.transpose(1, 2).flatten(2))
        return out


class VideoDiT(nn.Module):
    """Latents (B, C, F, H, W), times (B,) in [0, 1] and text to an output like latents. The text:
    token ids (B, L), or stored embeddings (B, L, values) and their mask (B, L).

    Any F, H and W: what is no multiple of the patch is padded by its edge and cut off again. A
    new model's output is 0, as its last layer is.
    """

    _no_split_modules = ("Block",)  # what FSDP gathers at a time; accelerate's name for it

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        model, channels = config.model, config.shape[0]
        assert isinstance(model, DiTSettings)
        self.patch, self.again = model.patch, False
        self.width = model.width
        values = channels * math.prod(model.patch)
        self.text = (
            StoredText(config.embeddings["width"], model.width)
            if config.embeddings is not None
            else TextEncoder(config.text, model.width, model.heads)
        )
        # A mean of many words is small, and what tells captions apart in it smaller.
        self.pooled = nn.Sequential(nn.LayerNorm(model.width), nn.Linear(model.width, model.width))
        self.time = nn.Sequential(
            nn.Linear(model.width, model.width), nn.SiLU(), nn.Linear(model.width, model.width)
        )
        self.embed = nn.Linear(values, model.width)
        self.blocks = nn.ModuleList(Block(model.width, model.heads) for _ in range(model.depth))
        self.norm = nn.LayerNorm(model.width, eps=1e-6, elementwise_affine=False)
        self.modulation = nn.Sequential(nn.SiLU(), nn.Linear(model.width, 2 * model.width))
        self.unembed = nn.Linear(model.width, values)
        self.initialise()

    def initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        if isinstance(self.text, TextEncoder):
            nn.init.normal_(self.text.embed.weight, std=0.02)
            nn.init.normal_(self.text.place, std=0.02)
        for module in [*self.blocks, self]:
            nn.init.zeros_(module.modulation[-1].weight)
        nn.init.zeros_(self.unembed.weight)

    def forward(self, x: Tensor, time: Tensor, text: Text) -> Tensor:
        size = x.shape[2:]
        tokens, grid = self.patchify(x)
        tokens = self.embed(tokens) + positions(grid, self.width).to(tokens)
        words, mask, whole = self.text(text)
        mask = F.pad(mask, (0, tokens.shape[1]), value=True)[:, None, None]
        condition = self.time(sinusoid(time * TIMESTEPS, self.width)) + self.pooled(whole)

        tokens = torch.cat([words.to(tokens.dtype), tokens], 1)
        for block in self.blocks:
            if self.again and torch.is_grad_enabled():
                tokens = checkpoint(block, tokens, condition, mask, use_reentrant=False)
            else:
                tokens = block(tokens, condition, mask)
        tokens = tokens[:, words.shape[1] :]

        shift, scale = self.modulation(condition).unsqueeze(1).chunk(2, -1)
        out = self.unembed(self.norm(tokens) * (1 + scale) + shift)
        return self.unpatchify(out, grid)[..., : size[0], : size[1], : size[2]]

    def checkpoint(self) -> None:
        """Computes activations again in the backward pass rather than keeping them."""
        self.again = True

    def patchify(self, x: Tensor) -> tuple[Tensor, tuple[int, int, int]]:
        """Latents to (B, N, values of a patch) and the grid (f, h, w) of patches, N = f h w."""
        t, h, w = self.patch
        frames, rows, columns = x.shape[2:]
        x = F.pad(x, (0, -columns % w, 0, -rows % h, 0, -frames % t), mode="replicate")
        batch, channels, frames, rows, columns = x.shape
        grid = frames // t, rows // h, columns // w
        x = x.view(batch, channels, grid[0], t, grid[1], h, grid[2], w)
        return x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4).flatten(1, 3), grid

    def unpatchify(self, x: Tensor, grid: tuple[int, int, int]) -> Tensor:
        (f, h, w), (pt, ph, pw) = grid, self.patch
        x = x.view(x.shape[0], f, h, w, -1, pt, ph, pw).permute(0, 4, 1, 5, 2, 6, 3, 7)
        return x.reshape(x.shape[0], -1, f * pt, h * ph, w * pw)


def sinusoid(values: Tensor, width: int) -> Tensor:
    """The sine-cosine encoding of (N,) values: (N, width), width even; periods from 2 pi up."""
    half = width // 2
    rates = torch.exp(torch.arange(half, device=values.device) * (-math.log(10_000) / half))
    angles = values.float()[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], 1)


def positions(grid: tuple[int, int, int], width: int) -> Tensor:
    """Where each patch of a grid stands: (N, width), the axes' encodings side by side."""
    third = 2 * (width // 6)
    axes = torch.meshgrid(*(torch.arange(size) for size in grid), indexing="ij")
    shares = (width - 2 * third, third, third)
    return torch.cat([sinusoid(axis.flatten(), n) for axis, n in zip(axes, shares)], 1)


def build(config: ModelConfig) -> VideoDiT | Family:
    """A new model with weights from torch's global generator, or those of `model.path`. Raises
    SettingsError where these cannot be had, or do not fit the latents or the text."""
    return families.build(config) if isinstance(config.model, FamilySettings) else VideoDiT(config)


def save(
    model: VideoDiT | Family, state: dict[str, Tensor], config: ModelConfig, folder: Path
) -> None:
    """Writes a model with the weights of `state` and its config into an existing folder."""
    if isinstance(model, Family):
        model.export(state, folder)
    else:
        state = {name: value.contiguous() for name, value in state.items()}
        save_file(state, folder / WEIGHTS, metadata={"format": "pt"})
    (folder / CONFIG).write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")


def load(folder: Path) -> tuple[VideoDiT | Family, ModelConfig]:
    """The model of an export or of a checkpoint, on the CPU, ready to sample; of weights that
    were averaged, the average. Raises FileNotFoundError, and SettingsError where adapters' own
    network is not there."""
    config = ModelConfig.model_validate_json((folder / CONFIG).read_text(encoding="utf-8"))
    model = build(config)
    spread = sharding.holds(folder)
    if isinstance(model, Family) and not (folder / WEIGHTS).exists() and not spread:
        model.restore(folder)
    else:
        found = (
            sharding.saved(folder, model.state_dict()) if spread else load_file(folder / WEIGHTS)
        )
        if (folder / ema.FILE).exists():
            found |= load_file(folder / ema.FILE)
        model.load_state_dict(found, strict=not adapted(config))
    return model.eval(), config


def holds(folder: Path) -> bool:
    """Whether `folder` is one that `load` loads."""
    weights = (WEIGHTS, lora.FILE, *{family.part for family in families.FAMILIES.values()})
    found = any((folder / name).exists() for name in weights) or sharding.holds(folder)
    return found and (folder / CONFIG).is_file()


def adapted(config: ModelConfig) -> bool:
    """Whether adapters alone are trained, and saved in checkpoints."""
    return isinstance(config.model, FamilySettings) and config.model.lora is not None
