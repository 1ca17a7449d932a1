"""What networks of diffusers cannot be trained with, told before the first step."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import SHAPE, config, make, make_flat
from safetensors.torch import load_file, save_file

from trainer import families
from trainer.config import SettingsError


@pytest.mark.parametrize(
    ("kind", "values", "told"),
    [
        ("wan", {"text": {"kind": "words"}, "embeddings": None}, ["train.text.kind is words"]),
        (
            "ltx",
            {"padding": "none", "shape": (8, 4, 4, 4)},
            ["have 8 channels", "takes 4 and gives 4:"],
        ),
        ("wan", {"padding": "max_length"}, ["padding max_length", "embed.padding"]),
        ("ltx", {"padding": "max_length"}, ["padding max_length", "ltx takes none"]),
        ("unet3d", {"padding": "none"}, ["padding none", "takes max_length"]),
        ("unet3d", {"model": {"first_frame": 0.5}}, ["has no way", "cogvideox, wan or ltx"]),
        ("cogvideox", {"model": {"first_frame": 0.5}}, ["takes 4 channels, not the 8"]),
        (
            "cogvideox",
            {"model": {"config": {"in_channels": 8}}},
            ["takes 8 channels", "train.model.first_frame", "0.95"],
        ),
        (
            "cogvideox",
            {"model": {"config": {"max_text_seq_length": 226}}},
            ["5 tokens", "226", "embed.max_length"],
        ),
        ("wan", {"model": {"config": {"in_channels": 12}}}, ["grey frames", "TI2V"]),
        ("wan", {"model": {"config": {"text_dim": 8}}}, ["gives 6 values", "takes 8", "embed"]),
        ("wan", {"model": {"config": {"hight": 8}}}, ["config.hight is unknown", "ffn_dim"]),
        ("unet3d", {"model": {"config": {"norm_num_groups": 5}}}, ["does not make a UNet3D"]),
    ],
)
def test_what_does_not_fit_is_told(kind: str, values: dict[str, Any], told: list[str]) -> None:
    with pytest.raises(SettingsError) as error:
        families.build(config(kind, **values))
    for part in told:
        assert part in str(error.value)


def test_what_path_cannot_be(network: Callable[[str], Path], tmp_path: Path) -> None:
    def told(kind: str, **values: Any) -> str:
        with pytest.raises(SettingsError) as error:
            families.build(config(kind, **values))
        return str(error.value)

    assert "no model in" in told("wan", model={"path": str(tmp_path)})
    assert "there is no folder ./none" in told("wan", model={"path": "./none"})
    assert (
        f"{network('ltx')} holds a LTXVideoTransformer3DModel, but train.model.kind is wan"
        in told("wan", model={"path": str(network("ltx"))})
    )
    assert "train.objective is epsilon, but wan was trained on flow" in told(
        "wan", model={"path": str(network("wan"))}, objective="epsilon"
    )
    no_such = {"path": str(network("wan")), "lora": {"targets": ["to_x"]}}
    assert "Linear layers end in" in told("wan", model=no_such)
    make_flat(tmp_path / "unet")
    grown = {"path": str(tmp_path), "lora": {}}
    assert "leave train.model.lora out" in told("unet3d", model=grown)


def test_a_hub_that_is_out_of_reach_is_told_at_once(
    network: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """And what was fetched before is used."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(SettingsError, match=r"owner/name can't be fetched: .* can't be reached \("):
        families.build(config("wan", model={"path": "owner/name"}))
    assert "Retrying" not in caplog.text
    with pytest.raises(SettingsError, match=r"no folder owner/name/x, and a hub id reads"):
        families.build(config("wan", model={"path": "owner/name/x"}))
    with pytest.raises(SettingsError, match=r"no folder models/wan 2, and a hub id reads"):
        families.build(config("wan", model={"path": "models/wan 2"}))
    commit = "1234567890" * 4
    known = tmp_path / "models--owner--name"
    (known / "refs").mkdir(parents=True)
    (known / "refs" / "main").write_text(commit)
    shutil.copytree(network("wan"), known / "snapshots" / commit / "transformer")
    built = families.build(config("wan", model={"path": "owner/name"}))
    own = load_file(network("wan") / "diffusion_pytorch_model.safetensors")
    assert own and all(torch.equal(built.net.state_dict()[k], v) for k, v in own.items())


def test_a_missing_package_is_told(
    network: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)  # as if it were not there
    with pytest.raises(SettingsError, match="pip install peft"):
        families.build(config("wan", model={"path": str(network("wan")), "lora": {}}))


def test_damaged_weights_are_told(tmp_path: Path) -> None:
    file = make("wan", tmp_path) / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    del state["proj_out.weight"]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(SettingsError, match=r"lacks 1 weights .* proj_out\.weight"):
        families.build(config("wan", model={"path": str(tmp_path)}))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(SettingsError, match="cannot be loaded"):
        families.build(config("wan", model={"path": str(tmp_path)}))


@pytest.mark.parametrize(
    ("kind", "values", "shape", "told"),
    [
        (
            "wan",
            {},
            (4, 3, 5, 4),
            "have 5 rows, .* patches of 2: make sampling.size a multiple of 16",
        ),
        (
            "cogvideox",
            {"patch_size_t": 2},
            (4, 3, 4, 4),
            "3 frames, .* multiple of 2 latent frames",
        ),
        (
            "cogvideox",
            {"use_learned_positional_embeddings": True},
            (4, 4, 8, 8),
            r"positions of 4 x 4 .* sampling.size to \[32, 32\]",
        ),
    ],
)
def test_shapes_that_cannot_be_cut_are_told(
    kind: str, values: dict[str, Any], shape: tuple[int, ...], told: str
) -> None:
    model = families.build(config(kind, model={"config": values}))
    model.check_shape(SHAPE)
    with pytest.raises(SettingsError, match=told):
        model.check_shape(shape)
