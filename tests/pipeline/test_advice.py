from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from manifests.sources import SourceRow, SourceSettings
from pipeline import config, dag
from pipeline.advice import advice
from pipeline.cli import cli

YAML = """\
workdir: ./work
source: {kind: folder, path: ./videos}
sampling: {fps: 8, frames: 49, size: 64}
filter: {rules: {length: "len >= 49", wide: "width >= height", both: "len > width"}}
recaption: {enabled: false}
"""
FEWER = "clips that filter lets through: they need 49 frames (sampling.frames), and filter takes 48"
NONE = "filter lets no clip through: `len` is at most sampling.frames, 49: length (len == 64)"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        ([], None),
        (["filter.rules.length='len = 49'"], None),
        (["filter.rules.length='len >= 48'"], FEWER),
        (["filter.rules.length='len >= 48'", "sampling.short=repeat"], None),
        (["filter.rules.length='len >= 48'", "filter.rules.more='len % 7 = 0'"], None),
        (["filter.rules.length='len == 64'"], NONE),
        (["filter.rules.length='len == 64'", "sampling.short=pad"], NONE),
        (["filter.rules={wide: width > 9}"], None),
        (["filter.rules.length='len == 64'", "encode.enabled=false"], None),
        (["filter.enabled=false"], None),
        (["filter.rules.length=\"1 / len > 0 or len::varchar = 'x'\""], "need 49 frames"),
        (["sampling.buckets=[[17, 64, 64], [33, 64, 64]]"], "at most the frames of a bucket, 33"),
        (
            ["sampling.buckets=[[17, 64, 64], [33, 64, 64]]", "filter.rules.length='len >= 9'"],
            "they need 17 frames (the frames of a bucket), and filter takes 9",
        ),
    ],
)
def test_rules_on_len_that_do_not_fit_the_sampling(
    tmp_path: Path, overrides: list[str], said: str | None
) -> None:
    made = dag.build(config.parse(YAML, str(tmp_path / "vidpipe.yaml"), overrides))
    assert len(advice(made)) == (said is not None)
    assert said is None or said in advice(made)[0]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["recaption.enabled=true", "recaption.model=some/model"], True),
        (["recaption.enabled=true", "recaption.preset=rewrite-described"], False),
        (["recaption.enabled=true", "recaption.prompt='{caption} {description?}'"], False),
        (["recaption.enabled=false"], False),
    ],
)
def test_descriptions_that_nobody_reads(tmp_path: Path, overrides: list[str], said: bool) -> None:
    text = f"{YAML}describe: {{model: some/model}}\n"
    made = dag.build(config.parse(text, str(tmp_path / "vidpipe.yaml"), overrides))
    assert ["rewrite-described" in sentence for sentence in advice(made)] == [True] * said


@pytest.mark.parametrize(
    ("overrides", "captions", "said"),
    [
        ([], {}, True),
        (["describe.model=m/m", "recaption.preset=rewrite-described"], {}, False),
        (["recaption.prompt='{uri} {caption?}'"], {}, False),
        (["recaption.enabled=false"], {}, False),
        ([], {"b": "a bird"}, False),
        ([], {"a": " \n"}, True),
    ],
)
def test_captions_that_are_not_there(
    tmp_path: Path, overrides: list[str], captions: dict[str, str], said: bool
) -> None:
    (tmp_path / "videos").mkdir()
    for name in ("a", "b"):
        (tmp_path / "videos" / f"{name}.mp4").write_bytes(b"no video")
    for name, text in captions.items():
        (tmp_path / "videos" / f"{name}.txt").write_text(text)
    text = YAML.replace("{enabled: false}", "{model: some/model}")
    made = dag.build(config.parse(text, str(tmp_path / "vidpipe.yaml"), overrides))
    found = [line for line in advice(made) if "no row of the source has a caption" in line]
    assert len(found) == said
    assert all("section `describe`" in line for line in found)
    assert advice(made, ["recaption"]) == found
    assert not advice(made, ["probe"])


def test_where_captions_are_described_already_that_is_not_advised(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(b"no video")
    text = YAML.replace("{enabled: false}", "{model: some/model}")
    both = ["describe.model=m/m", "recaption.prompt='{caption} {description}'"]
    made = dag.build(config.parse(text, str(tmp_path / "vidpipe.yaml"), both))
    (line,) = [line for line in advice(made) if "has a caption" in line]
    assert "{caption?}" in line and "section `describe`" not in line


def test_no_more_of_the_source_is_read_than_shows_that_there_are_captions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def rows(source: SourceSettings) -> Iterator[SourceRow]:
        yield SourceRow("a.mp4", None, None, None, "a", {})
        yield SourceRow("b.mp4", "a bird", None, None, "b", {})
        raise AssertionError("each may be a request to a store far away")

    monkeypatch.setattr("pipeline.advice.read", rows)
    text = YAML.replace("{enabled: false}", "{model: some/model}")
    made = dag.build(config.parse(text, str(tmp_path / "vidpipe.yaml"), []))
    assert not advice(made, ["recaption"])


def test_plan_warns_of_captions_that_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(b"no video")
    text = YAML.replace("{enabled: false}", "{engine: transformers, model: 'demo://captioner'}")
    (tmp_path / "vidpipe.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    for words in (["plan"], ["plan", "recaption"], ["doctor"]):
        done = CliRunner().invoke(cli, words)
        assert done.exit_code == 0, done.stderr
        assert "by a section `describe`" in " ".join((done.stdout + done.stderr).split()), words


def test_plan_and_doctor_say_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(b"no video")
    (tmp_path / "vidpipe.yaml").write_text(YAML.replace("len >= 49", "len >= 48"))
    monkeypatch.chdir(tmp_path)
    planned = CliRunner().invoke(cli, ["plan"])
    assert planned.exit_code == 0
    assert FEWER in " ".join(planned.stderr.split())
    examined = CliRunner().invoke(cli, ["doctor"])
    assert FEWER in examined.stdout
    assert "FAIL" not in [line[:4] for line in examined.stdout.splitlines() if FEWER in line]
