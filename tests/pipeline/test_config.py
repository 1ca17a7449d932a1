"""vidpipe.yaml: what works as it stands, and what each mistake is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import Config, ConfigError, load, parse

SHORT = """\
workdir: ./work
source: {kind: folder, path: ./videos}
sampling: {fps: 16, frames: 64, size: 256, fit: crop}
filter: {rules: {length: "len == 64"}}
recaption: {engine: transformers, model: "demo://captioner"}
encode: {vae: "demo://vae"}
"""


def parsed(text: str, folder: Path, *overrides: str) -> Config:
    return parse(text, str(folder / "vidpipe.yaml"), overrides)


def test_the_short_file_works_with_everything_else_at_its_default(tmp_path: Path) -> None:
    config = parsed(SHORT, tmp_path)
    assert config.workdir == str(tmp_path / "work")
    assert config.source.path == str(tmp_path / "videos")
    assert (config.sampling.fps, config.sampling.frames, config.sampling.height) == (16, 64, 256)
    assert {"download", "probe", "score", "filter", "recaption", "encode"} <= set(config.stages)
    assert config.stages["filter"].settings.rules == {"length": "len == 64"}
    assert config.run.runner == "ray"


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("fps: 16", "fbs: 16", "vidpipe.yaml:3: unknown key `sampling.fbs`. Did you mean fps?"),
        ("fps: 16", "fps: quick", "vidpipe.yaml:3: `sampling.fps` is 'quick'"),
        ("fps: 16", "fps: -1", "vidpipe.yaml:3: `sampling.fps` is -1"),
        ("fit: crop", "fit: stretch", "'crop', 'pad' or 'squash'"),
        ("engine: transformers", "engine: vlm", "vidpipe.yaml:5: `recaption.engine` is 'vlm'"),
        ("vae:", "vea:", "vidpipe.yaml:6: unknown key `encode.vea`. Did you mean vae?"),
        ("encode:", "encoed:", "vidpipe.yaml:6: unknown key `encoed`. Did you mean encode?"),
        ("kind: folder, ", "", "vidpipe.yaml:2: `source.kind` is missing"),
        ("kind: folder", "kind: folders", "vidpipe.yaml:2: `source.kind` is 'folders'"),
        (
            "workdir: ./work",
            "workdir: ./work\nworkdir: ./other",
            "vidpipe.yaml:2: `workdir` stands",
        ),
        ("encode:", "  encode:", "vidpipe.yaml:6: not YAML"),
        ('"demo://vae"', "!!python/object/apply:os.getcwd []", "vidpipe.yaml:6: not YAML"),
    ],
)
def test_a_mistake_names_line_key_value_and_what_is_allowed(
    tmp_path: Path, old: str, new: str, told: str
) -> None:
    assert old in SHORT
    with pytest.raises(ConfigError) as caught:
        parsed(SHORT.replace(old, new), tmp_path)
    assert told in str(caught.value)


def test_an_unknown_key_lists_what_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"Allowed here: buckets, fit, fps, frames, .*size, start, windows"
    ):
        parsed(SHORT.replace("fps: 16", "zzz: 16"), tmp_path)


def test_settings_can_be_overridden(tmp_path: Path) -> None:
    config = parsed(
        SHORT, tmp_path, "sampling.frames=32", "filter.rules.length='len >= 48'", "encode.workers=2"
    )
    assert config.sampling.frames == 32
    assert config.stages["filter"].settings.rules == {"length": "len >= 48"}
    assert config.stages["encode"].settings.workers == 2
    with pytest.raises(ConfigError, match=r"--set: sampling.frames: `sampling.frames` is 'many'"):
        parsed(SHORT, tmp_path, "sampling.frames=many")
    with pytest.raises(ConfigError, match=r"expected key.of.setting=value"):
        parsed(SHORT, tmp_path, "sampling.frames")
    with pytest.raises(ConfigError, match="holds a value, not a section"):
        parsed(SHORT, tmp_path, "workdir.frames=3")


def test_a_stage_can_be_left_out(tmp_path: Path) -> None:
    config = parsed(SHORT, tmp_path, "recaption.enabled=false")
    assert "recaption" not in config.stages and "encode" in config.stages


def test_a_missing_file_says_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vidpipe init"):
        load(str(tmp_path / "vidpipe.yaml"))
    (tmp_path / "vidpipe.yaml").write_text("- a list")
    with pytest.raises(ConfigError, match="a mapping of settings is expected"):
        load(str(tmp_path / "vidpipe.yaml"))


USER_STAGE = """
import pyarrow as pa
from pydantic import Field
from stages.base import Stage, StageSettings

class TooWide(StageSettings):
    ratio: float = Field(2.0, description="width over height")

class Wide(Stage):
    name = "wide"
    Settings = TooWide
    reads = ("width", "height")
    adds = pa.schema([pa.field("wide", pa.bool_())])

    def process(self, rows, model):
        return [{"wide": r["width"] > self.settings.ratio * r["height"]} for r in rows]

class NoStage:
    pass
"""


def test_a_stage_of_the_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_wide_stage.py").write_text(USER_STAGE)
    use = 'stages: {wide: {use: "my_wide_stage:Wide", ratio: 3}}\n'
    config = parsed(SHORT + use, tmp_path)
    assert config.stages["wide"].settings.ratio == 3
    for wrong, told in (
        (use.replace("ratio", "ration"), "unknown key `stages.wide.ration`. Did you mean ratio?"),
        (use.replace(":Wide", ":Wider"), "has no class Wider"),
        (use.replace("my_wide_stage:", "not_there_at_all:"), "No module named 'not_there_at_all'"),
        (use.replace(":Wide", ":NoStage"), "is no stage"),
        (use.replace("{wide:", "{broad:"), "calls itself 'wide'"),
        ('stages: {probe: {use: "stages.probe:Probe"}}\n', "stage probe exists already"),
        ("stages: {wide: {ratio: 3}}\n", 'needs `use: "module:Class"`'),
    ):
        with pytest.raises(ConfigError) as caught:
            parsed(SHORT + wrong, tmp_path)
        assert told in str(caught.value)
        assert str(caught.value).startswith(f"{tmp_path}/vidpipe.yaml:7: ")
