"""What `vidpipe train` hands over: settings that the trainer takes, and that its latents meet."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from toys import Length, Limit, Shout
from toys import pipeline as toys

from manifests.intake import scan
from manifests.scans import SCANS, scans, which
from manifests.shards import LATENTS, Index, LatentSpec
from manifests.sources import SourceSettings
from pipeline import index, training
from pipeline.config import ConfigError, parse
from pipeline.dag import build
from pipeline.report import Reporter
from pipeline.run import run
from pipeline.unit import Retry
from stages.base import Outcome, Row
from trainer.config import SettingsError, parse_settings
from trainer.expected import check_expected

SAMPLINGS: list[dict[str, Any]] = [
    {},
    {"size": [64, 96], "frames": 16, "fps": 12.5},
    {"policy": "seed", "windows": 3},
    {"policy": "interval", "interval": 3, "fps": 99},
    {"buckets": [[17, 64, 96], [17, 96, 64], [9, 96, 96]], "frames": 5},
]


def pipeline(folder: Path, sampling: dict[str, Any], **more: Any) -> Any:
    values = {
        "workdir": "work",
        "source": {"kind": "folder", "path": "."},
        "sampling": sampling,
        "encode": {"vae": "demo://vae"},
        "recaption": {"enabled": False},
        **more,
    }
    return build(parse(json.dumps(values), str(folder / "vidpipe.yaml")))


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_latents_meet_what_their_own_sampling_expects(
    sampling: dict[str, Any], tmp_path: Path
) -> None:
    made = pipeline(tmp_path, sampling)
    settings = parse_settings(training.settings(made))
    # As the stage encode stores it; what has no effect may have been otherwise then.
    idle = {"fps": 1.0} if sampling.get("policy") == "interval" else {"interval": 77}
    told = made.config.sampling.model_dump(mode="json") | idle
    if "buckets" in sampling:
        told |= {"frames": 1, "size": 2}

    def spec(**other: Any) -> LatentSpec:
        return LatentSpec("v", "c", "s", "f", True, 4, 1, 8, [], [], told | other)

    check_expected(settings.expect, spec())
    for other in ({"policy": "time" if sampling.get("policy") == "seed" else "seed"},):
        with pytest.raises(SettingsError, match=r"train\.expect\.policy is .* made with"):
            check_expected(settings.expect, spec(**other))
    shapes = {"buckets": [{"frames": 1, "height": 8, "width": 8}]}
    with pytest.raises(SettingsError, match=r"train\.expect\.buckets is .* made with \[\[1, 8, 8"):
        check_expected(settings.expect, spec(**shapes))


class Encode(Shout):
    name = "encode"
    adds = LATENTS

    def metadata(self, model: str) -> dict[str, Any]:
        return {"spec": asdict(LatentSpec("v", "c", "s", "f", False, 1, 1, 8, [0.0], [1.0]))}

    def process(self, rows: list[Row], model: str) -> list[Outcome]:
        made = {"latents": b"1234", "latents_shape": [1, 1, 1, 1], "latents_dtype": "float32"}
        return [{**dict.fromkeys(LATENTS.names), **made, "frame_times": [0.0]} for _ in rows]


def test_what_waits_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = [Length, Limit, Encode]
    captions: list[str | None] = ["a red cat", "dog", "a very long one"]
    made = toys(tmp_path, captions, stages)
    run(made, (), Retry(), Reporter())
    training.prepare(made)
    said = capsys.readouterr().err
    assert "training on 2 clips" in said and "rows that wait" not in said
    more = toys(tmp_path, [*captions, "new", "newer"], stages)
    scan(more.store, more.config.source, 4)
    training.prepare(more)
    told = capsys.readouterr().err
    assert "training on 2 clips" in told
    assert "not trained on are rows that wait: 2 at length. `vidpipe run` brings them in" in told


def test_the_captions_of_another_source_are_not_trained_on(tmp_path: Path) -> None:
    """The same clips in two tables: latents are the same, and captions are those read last."""
    stages = [Length, Limit, Encode]
    made = toys(tmp_path, ["red", "blue"], stages)
    run(made, (), Retry(), Reporter())
    table = Path(made.config.source.path)
    shuffled = table.with_name("shuffled.jsonl")
    lines = [json.loads(line) for line in table.read_text().splitlines()]
    captions = [line["text"] for line in lines]
    rows = [line | {"text": other} for line, other in zip(lines, reversed(captions))]
    shuffled.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def of(**changes: Any) -> Any:  # as a configuration that says so
        source = made.config.source.model_copy(update=changes)
        return replace(made, config=replace(made.config, source=source, written=source))

    other = of(path=str(shuffled))
    run(other, (), Retry(), Reporter())
    training.prepare(other)
    with pytest.raises(ConfigError) as error:
        training.prepare(made)
    assert f"are those of {shuffled}, which was read last, not those of {table}, as `source`" in (
        str(error.value)
    )
    assert "`vidpipe run` first" in str(error.value)
    with pytest.raises(ConfigError, match="with other settings of `source` than these"):
        training.prepare(of(path=str(shuffled), encoding="latin-1"))
    training.prepare(of(path=str(shuffled), watch=7))
    run(made, (), Retry(), Reporter())
    training.prepare(made)
    assert Index.open(index.path(made)).table.column("caption").to_pylist() == captions


def test_a_workdir_that_was_moved_with_its_source_is_trained_on(tmp_path: Path) -> None:
    stages = [Length, Limit, Encode]
    (tmp_path / "here").mkdir()
    written = SourceSettings(kind="jsonl", path="clips.jsonl")

    def there(folder: Path) -> Any:
        made = toys(folder, ["red", "blue"], stages)
        return replace(made, config=replace(made.config, written=written))

    run(there(tmp_path / "here"), (), Retry(), Reporter())
    (tmp_path / "here").rename(tmp_path / "there")
    moved = there(tmp_path / "there")
    Path(moved.config.source.path).unlink()  # training needs no source
    training.prepare(moved)


def test_a_source_that_only_goes_by_another_name_is_known_after_the_next_run(
    tmp_path: Path,
) -> None:
    """Nothing is read anew for that, also where the workdir is from before names were recorded."""
    stages = [Length, Limit, Encode]
    made = toys(tmp_path, ["red", "blue"], stages)
    run(made, (), Retry(), Reporter())
    record = Path(made.store.path(made.store.find(SCANS)[-1]))
    told = json.loads(record.read_text())
    for name in ("source", "path"):
        del told[name]
    record.write_text(json.dumps(told))
    training.prepare(made)
    for name, records in (("./clips.jsonl", 2), ("clips.jsonl", 2), ("../x/clips.jsonl", 3)):
        written = SourceSettings(kind="jsonl", path=name)
        renamed = replace(made, config=replace(made.config, written=written))
        run(renamed, (), Retry(), Reporter())
        assert len(scans(made.store)) == records
        training.prepare(renamed)
    with pytest.raises(ConfigError, match=r"those of \.\./x/clips\.jsonl, which was read last"):
        training.prepare(made)


def test_a_table_s_new_signature_is_the_same_source() -> None:
    def signed(words: str) -> tuple[str, str]:
        url = f"https://host/clips.csv?X-Amz-Signature={words}&X-Amz-Date={words}"
        return which(SourceSettings(kind="csv", path=url))

    assert signed("aaaa")[0] == signed("bbbb")[0]
    assert "aaaa" not in signed("aaaa")[1]


def test_where_nothing_is_ready_it_is_told_why_and_the_index_stays(tmp_path: Path) -> None:
    stages = [Length, Limit, Encode]
    captions: list[str | None] = ["a red cat", "dog", "a very long one"]
    made = toys(tmp_path, captions, stages)
    run(made, (), Retry(), Reporter())
    file = Path(made.store.path(index.INDEX_NAME))
    before = file.read_bytes()
    changed = toys(tmp_path, captions, stages, {"limit": {"most": 0}})
    with pytest.raises(ConfigError) as error:
        training.prepare(changed)
    assert "ready to train on: limit leaves none, 3 pending (" in str(error.value)
    assert "limit: 0 kept, 0 rejected, 0 failed, 3 pending; encode: " in str(error.value)
    assert "`vidpipe run` first" in str(error.value)
    assert str(error.value).endswith(". The index of before stays")
    assert file.read_bytes() == before and not index.up_to_date(changed)
    assert index.refresh(made) is None, "back with the rule of before it is the right one"

    # Only once it is certain that there is nothing, it goes.
    run(changed, (), Retry(), Reporter())
    assert not file.exists()
    with pytest.raises(ConfigError) as error:
        training.prepare(changed)
    assert "limit leaves none, 3 rejected (too_long 3) (" in str(error.value)
    assert "stays" not in str(error.value)


def test_samples_are_told_their_vae(tmp_path: Path) -> None:
    made = pipeline(tmp_path, {}, train={"samples": {"prompts": ["a dog"], "every": 3}})
    chosen = training.settings(made)
    training.name_models(made, chosen)
    samples = parse_settings(chosen).samples
    assert samples.vae is not None and (Path(samples.vae) / "config.json").is_file()
    assert (samples.prompts, samples.every, samples.text_encoder) == (("a dog",), 3, None)
    without = training.settings(pipeline(tmp_path, {}))
    training.name_models(made, without)
    assert "samples" not in without


def test_what_samples_are_asked_for_is_handed_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    monkeypatch.setattr(training, "call", lambda command: asked.extend(command) or 0)
    made = pipeline(tmp_path, {})
    training.sample(made, ["a", "b"], "a.gif", num=3, steps=None, guidance=1.5)
    assert asked[asked.index("--prompt") :] == [
        *("--prompt", "a", "--prompt", "b"),
        *("--num=3", "--guidance=1.5"),
    ]


def test_what_the_user_expects_comes_first(tmp_path: Path) -> None:
    made = pipeline(tmp_path, {}, train={"expect": {"fps": 3}, "steps": 5})
    chosen = training.settings(made, steps=7)
    assert chosen["expect"] == {"fps": 3} and chosen["steps"] == 7
    assert chosen["output"] == f"{made.config.workdir}/train"
