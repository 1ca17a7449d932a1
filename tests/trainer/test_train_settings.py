from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from trainer.config import (
    ModelConfig,
    SettingsError,
    TrainSettings,
    load_settings,
    parse_settings,
)

NEEDED = {"index": "work/index.parquet", "output": "out"}


def test_defaults_are_those_of_flow_matching() -> None:
    settings = parse_settings(NEEDED)
    assert (settings.objective, settings.density, settings.steps) == ("flow", "logit_normal", 1000)
    assert settings.output == Path("out")


@pytest.mark.parametrize("objective", ["epsilon", "v_prediction"])
def test_schedules_draw_times_evenly_unless_told(objective: str) -> None:
    assert parse_settings({**NEEDED, "objective": objective}).density == "uniform"
    told = parse_settings({**NEEDED, "objective": objective, "timesteps": "logit_normal"})
    assert told.density == "logit_normal"


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"bach_size": 4}, ["train.bach_size is unknown", "did you mean batch_size?", "keep"]),
        ({"model": {"hed": 4}}, ["train.model.hed is unknown", "heads, patch"]),
        ({"objective": "x0"}, ['train.objective is "x0"', "'epsilon', 'v_prediction' or 'flow'"]),
        ({"batch_size": 0}, ["train.batch_size is 0: it must be greater than or equal to 1"]),
        ({"learning_rate": float("inf")}, ["train.learning_rate", "finite"]),
        ({"model": {"width": 100, "heads": 3}}, ["train.model: width 100", "6"]),
        ({"model": {"patch": [1, 0, 2]}}, ["patch [1, 0, 2]"]),
        ({"loss_weight": "min_snr"}, ["loss_weight is min_snr", "epsilon or v_prediction"]),
        ({"loss_weight": "snr"}, ["loss_weight is snr", "logit_normal"]),
        ({"min_snr_gamma": 5}, ["min_snr_gamma is 5.0", "leave it out"]),
        (
            {"objective": "epsilon", "min_snr_gamma": 5},
            ["min_snr_gamma is 5.0", "set loss_weight to min_snr"],
        ),
        (
            {"objective": "epsilon", "zero_terminal_snr": True},
            ["zero_terminal_snr", "set objective to v_prediction"],
        ),
        ({"zero_terminal_snr": True}, ["zero_terminal_snr", "pure noise anyway", "v_prediction"]),
        ({"snr_shift": 9}, ["snr_shift is 9.0", "set shift to 3,"]),
        ({"shift": 0}, ["train.shift is 0: it must be greater than 0"]),
        (
            {"shift": 3, "shift_tokens": [[256, 0.5], [4096, 1.15]]},
            ["shift is 3.0, but shift_tokens says it too"],
        ),
        ({"shift_tokens": [[9, 1], [9, 2]]}, ["shift_tokens is [[9, 1.0], [9, 2.0]]", "fewer"]),
        ({"expect": {"size": "big"}}, ["train.expect.height", "train.expect.width"]),
    ],
)
def test_an_error_names_key_value_and_what_is_allowed(
    values: dict[str, Any], parts: list[str]
) -> None:
    with pytest.raises(SettingsError) as error:
        parse_settings({**NEEDED, **values})
    for part in parts:
        assert part in str(error.value)


def test_all_errors_are_told_at_once() -> None:
    with pytest.raises(SettingsError) as error:
        parse_settings({"steps": 0, "seed": -1})
    told = str(error.value).splitlines()
    assert [line.split(" is ")[0] for line in told] == [
        "train.index",
        "train.output",
        "train.steps",
        "train.seed",
    ]


def test_size_stands_for_height_and_width() -> None:
    square, pair = (
        parse_settings({**NEEDED, "expect": {"size": size}}).expect for size in (64, [64, 96])
    )
    assert (square.height, square.width, pair.height, pair.width) == (64, 64, 64, 96)


def test_settings_are_read_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "settings.json"
    file.write_text(json.dumps({**NEEDED, "steps": 7}))
    assert load_settings(file).steps == 7
    file.write_text("steps: 7")
    with pytest.raises(SettingsError, match="are no JSON"):
        load_settings(file)
    with pytest.raises(SettingsError, match="cannot be read"):
        load_settings(tmp_path / "none.json")


def test_every_setting_is_described() -> None:
    sections = [TrainSettings, ModelConfig]
    for section in sections:
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name}"
            if isinstance(field.default_factory, type) and field.default_factory is not dict:
                sections.append(field.default_factory)
    assert len(sections) == 7
