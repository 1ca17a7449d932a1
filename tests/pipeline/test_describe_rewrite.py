"""describe and recaption one after the other, by vidpipe.yaml alone."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import pytest
from commands import Command, until

from pipeline import config, dag
from pipeline.captions import check
from pipeline.config import ConfigError
from pipeline.index import caption_column, needed
from pipeline.query import select
from pipeline.report import Reporter
from pipeline.run import run
from pipeline.unit import Retry

sys.path.insert(0, str(Path(__file__).parents[1] / "stages"))

YAML = """\
source: {kind: folder, path: ./videos}
sampling: {fps: 16, frames: 8, size: 64}
describe:
  engine: transformers
  model: ./llava
  device: cpu
  prompt: what is this
  max_tokens: 12
  quality: {fallback: keep, retries: 0}
recaption:
  engine: transformers
  model: "demo://captioner"
  device: cpu
  prompt: |-
    Caption: {caption?}
    {description}
  max_tokens: 12
  quality: {fallback: keep, retries: 0}
run: {runner: local, isolate: false}
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from numbered import make
    from tiny_llava import make_llava

    folder = tmp_path_factory.mktemp("project")
    videos = folder / "videos"
    videos.mkdir()
    for i in range(3):
        make(videos / f"{i}.mp4", 30 + i, 30)
    (videos / "0.txt").write_text("seven blocks")
    (videos / "3.mp4").write_text("no video")
    make_llava(folder / "llava")
    return folder


def built(project: Path, text: str = YAML) -> dag.Pipeline:
    return dag.build(config.parse(text, str(project / "vidpipe.yaml")))


def test_a_description_is_rewritten_with_the_caption_as_a_hint(project: Path) -> None:
    one = built(project)
    assert "describe" in one.upstream(["recaption"])
    result = run(one, ["recaption"], Retry(), Reporter())
    assert not result.faults
    columns = ["uri", "caption", "description", "description_times", "recaption", "recaption_raw"]
    rows = select(one, "recaption", "outcome = 'kept'", columns).to_pylist()
    assert len(rows) == 3
    assert all(row["description"] and row["recaption"] for row in rows)
    assert all(len(row["description_times"]) == 4 for row in rows), "of half a second"
    assert max(row["description_times"][-1] for row in rows) < 0.5
    found = check(one, "description")
    assert found.clips == 3 and found.sources == {"model": 3}


def test_another_hint_is_rewritten_and_not_described_anew(project: Path) -> None:
    one = built(project)
    run(one, ["recaption"], Retry(), Reporter())
    before = one.dag.layers["describe"].fingerprint
    again = built(project, YAML.replace("Caption: {caption?}", "Web: {caption?}"))
    assert again.dag.layers["describe"].fingerprint == before
    assert again.dag.layers["recaption"].fingerprint != one.dag.layers["recaption"].fingerprint
    (project / "videos" / "1.txt").write_text("eight blocks")
    described = files(one, "describe")
    assert not run(one, ["recaption"], Retry(), Reporter()).faults
    rows = select(one, "recaption", "outcome = 'kept'", ["caption"]).to_pylist()
    assert sorted(str(row["caption"]) for row in rows) == ["None", "eight blocks", "seven blocks"]
    assert files(one, "describe") == described, "another caption is seen in no frame"
    assert len(files(one, "recaption")) > 1


def files(one: dag.Pipeline, stage: str) -> list[str]:
    return sorted(str(path) for path in Path(one.config.workdir, stage).rglob("*.parquet"))


def test_descriptions_are_trained_on_where_nothing_rewrites_them(project: Path) -> None:
    both = built(project)
    assert (caption_column(both), needed(both)) == ("recaption", ["encode", "recaption"])
    seen = YAML[: YAML.index("recaption:")] + "recaption: {enabled: false}\n"
    alone = built(project, seen)
    assert (caption_column(alone), needed(alone)) == ("description", ["encode", "describe"])
    embedded = built(project, seen + "embed: {encoder: some/encoder}\n")
    assert caption_column(embedded) == "description"


def test_a_rewrite_of_descriptions_that_nobody_makes_is_an_error(project: Path) -> None:
    lone = "source: {kind: folder, path: ./videos}\nrecaption: {preset: rewrite-described}\n"
    with pytest.raises(ConfigError, match="recaption reads a column 'description' that nobody"):
        built(project, lone)


SERVED = """\
source: {kind: folder, path: ./videos}
sampling: {fps: 16, frames: 8, size: 64}
describe:
  engine: openai
  model: moody
  endpoints: ["%s"]
  prompt: "clip {caption}"
  concurrency: 4
  backoff: 0.1
recaption: {enabled: false}
encode: {enabled: false}
run: {runner: local, unit_size: 8}
"""
SAID = "A white block stands on a black wall and does not move"


def test_a_run_that_is_ended_goes_on_where_it_was(tmp_path: Path) -> None:
    """Real commands over a caption server: every clip is described by its own frames, once."""
    from moody import Moody
    from numbered import make

    videos = tmp_path / "videos"
    videos.mkdir()
    for i in range(40):
        make(videos / f"{i:02d}.mp4", 20 + i, 30)
        (videos / f"{i:02d}.txt").write_text(str(i))
    with Moody(delay=0.15, reply=lambda prompt, nth: f"{SAID}, says {prompt}.") as server:
        (tmp_path / "vidpipe.yaml").write_text(SERVED % server.url)
        command = Command(tmp_path, "run", "describe")
        until(lambda: server.met["none"] >= 12)
        command.signal(signal.SIGTERM)
        assert command.wait() == 143, command.said
        again = Command(tmp_path, "run", "describe")
        assert again.wait() == 0, again.said
        twice = server.asked.total() - 40
        frames = {prompt: len(tries[0][0]) for prompt, tries in server.shown.items()}
    one = built(tmp_path, SERVED % server.url)
    rows = select(one, "describe", "outcome = 'kept'").to_pylist()
    assert len(rows) == 40, again.said
    for row in rows:
        assert row["description"] == f"{SAID}, says clip {row['caption']}."
        assert len(row["description_times"]) == frames[f"clip {row['caption']}"] == 4
    assert twice <= 2 * server.most, "what was in flight"
    assert "tokens/s" in again.said
