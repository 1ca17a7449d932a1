"""The audit passes what is sound, also midway, and names every kind of corruption planted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner
from toys import Echo, Length, Limit, Shout, Words, pipeline

from manifests.log import Counts
from manifests.shards import CAPTIONS as CAPTIONS_TYPE
from manifests.shards import LATENTS, Index, LatentSpec
from pipeline import cli, dag, index
from pipeline import plan as planning
from pipeline.dag import Pipeline
from pipeline.report import Reporter
from pipeline.run import run
from pipeline.unit import Retry
from pipeline.upkeep.across import Audit
from pipeline.upkeep.audit import audit, equation
from stages.base import Outcome, Row

CAPTIONS = ["a red cat", "", "bad", "one two three four five", "dog", None, "a cow", "two pigs"]
SPEC = LatentSpec("v", "AutoencoderKL", "", "f", False, 1, 1, 8, [0.0], [1.0]).to_json()


class Encode(Shout):
    """Latents that tell whose they are."""

    name = "encode"
    adds = LATENTS

    def metadata(self, model: str) -> dict[str, Any]:
        return {"spec": SPEC}

    def process(self, rows: list[Row], model: str) -> list[Outcome]:
        made = dict.fromkeys(LATENTS.names)
        made |= {"latents_shape": [1, 1, 2, 2], "latents_dtype": "float32", "frame_times": [0.0]}
        return [{**made, "latents": (row["caption"] * 16).encode()[:16]} for row in rows]


class Recaption(Shout):
    name = "recaption"
    adds = pa.schema(
        [pa.field("recaption", pa.string()), pa.field("recaption_captions", CAPTIONS_TYPE)]
    )

    def process(self, rows: list[Row], model: str) -> list[Outcome]:
        return [self.written(row["caption"].upper() + model) for row in rows]

    def written(self, text: str) -> Row:
        short = {"kind": "short", "text": text[:2]}
        return {"recaption": text, "recaption_captions": [short] if len(text) > 4 else None}


def toys(folder: Path, captions: Sequence[str | None] = CAPTIONS, **settings: Any) -> Pipeline:
    stages = (Length, Limit, Recaption, Encode)
    return pipeline(folder, captions, stages, settings, {"unit_size": 4})


@pytest.fixture
def made(tmp_path: Path) -> Pipeline:
    made = toys(tmp_path)
    assert not run(made, (), Retry(), Reporter()).faults
    return made


def test_the_index_has_all_captions_of_a_clip(made: Pipeline) -> None:
    table = Index.open(index.path(made)).table
    several = {row["caption"]: row["captions"] for row in table.to_pylist()}
    assert several["A RED CAT!"] == [{"kind": "short", "text": "A "}]
    assert None in several.values(), "where there is one only"


def again(made: Pipeline) -> Audit:
    """Audited by a process that remembers nothing."""
    return audit(dag.build(made.config))


def texts(result: Audit) -> dict[str, list[str]]:
    return {f"{f.stage}: {f.what}": f.ids for f in result.findings.values()}


def data(made: Pipeline, stage: str) -> list[Path]:
    log = made.dag.log(made.store, stage)
    return [Path(made.store.path(n)) for n in made.store.find(log.prefix) if n.endswith(".parquet")]


def rewrite(file: Path, change: Callable[[pa.Table], pa.Table], forge: bool = True) -> None:
    """Changes a data file; with `forge` its commit agrees: length, hash, number of rows."""
    table = change(pq.read_table(file))
    pq.write_table(table, file)
    for commit in file.parent.glob("*.json"):
        values = json.loads(commit.read_text())
        if forge and values["data"] == file.name:
            sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
            values |= {"sha256": sha256, "size": file.stat().st_size, "rows": table.num_rows}
            commit.write_text(json.dumps(values))


def kept(file: Path) -> list[int]:
    outcomes = pq.read_table(file).column("outcome").to_pylist()
    return [i for i, outcome in enumerate(outcomes) if outcome == "kept"]


def swapped(table: pa.Table, column: str, rows: Sequence[int]) -> pa.Table:
    values = table.column(column).to_pylist()
    a, b = rows[:2]
    values[a], values[b] = values[b], values[a]
    place = table.column_names.index(column)
    return table.set_column(place, table.schema.field(column), pa.array(values))


def with_two(made: Pipeline, stage: str) -> Path:
    return next(file for file in data(made, stage) if len(kept(file)) >= 2)


def test_a_sound_run_passes_and_its_account_is_that_of_status(made: Pipeline) -> None:
    result = again(made)
    assert texts(result) == {} and result.notes == []
    assert result.counts == planning.status(made)
    assert result.indexed == 4
    assert equation(result.counts["length"]) == (
        "8 in = 5 kept + 2 rejected + 1 failed + 0 pending"
    )


def test_it_passes_at_every_step_of_a_run(tmp_path: Path) -> None:
    made = toys(tmp_path, length={"batch_size": 1})
    looks = 0

    class Looking(Reporter):
        def rows(self, stage: str, counts: Counts) -> None:
            nonlocal looks
            looks += 1
            assert texts(audit(made)) == {}

    run(made, (), Retry(), Looking())
    assert looks > 10


def test_it_passes_after_changes(tmp_path: Path, made: Pipeline) -> None:
    for settings in ({"limit": {"most": 1}}, {"recaption": {"mark": "?"}}, {}):
        changed = toys(tmp_path, **settings)
        assert texts(audit(changed)) == {}, "before they are run"
        run(changed, (), Retry(), Reporter())
        assert texts(audit(changed)) == {}
    run(made, (), Retry(True), Reporter())
    assert texts(again(made)) == {}, "after failed rows were tried again"
    for captions in (["a blue cat", *CAPTIONS[1:]], CAPTIONS[2:], [*CAPTIONS, "one more"]):
        changed = toys(tmp_path, captions)
        run(changed, (), Retry(), Reporter())
        assert texts(audit(changed)) == {}, captions


def test_it_passes_where_clips_are_split(tmp_path: Path) -> None:
    captions = [c for c in CAPTIONS if c]
    made = pipeline(tmp_path, captions, (Length, Words, Echo, Shout, Limit))
    assert not run(made, (), Retry(), Reporter()).faults
    result = again(made)
    assert texts(result) == {}
    assert result.counts == planning.status(made)
    assert result.counts["echo"].total > result.counts["words_of"].total


def test_a_row_that_stands_twice(made: Pipeline) -> None:
    file = data(made, "length")[0]
    rewrite(file, lambda t: pa.concat_tables([t, t.slice(0, 1)]))
    clip = pq.read_table(file).column("clip_id")[0].as_py()
    assert texts(again(made)) == {"length: a clip stands twice in one file": [clip]}


def test_a_row_settled_twice_in_two_commits(made: Pipeline) -> None:
    file = data(made, "length")[0]
    log = made.dag.log(made.store, "length")
    commit = log.commits(file.parent.name)[0]
    assert log.append(
        file.parent.name, 1, commit.inputs, commit.counts, pq.read_table(file).slice(1, 1)
    )
    clip = pq.read_table(file).column("clip_id")[1].as_py()
    assert texts(again(made))["length: a clip was settled twice"] == [clip]


def test_a_row_that_is_lost(made: Pipeline) -> None:
    file = with_two(made, "length")
    row = kept(file)[0]
    lost = pq.read_table(file).column("clip_id")[row].as_py()
    rewrite(file, lambda t: pa.concat_tables([t.slice(0, row), t.slice(row + 1)]))
    found = texts(again(made))
    (said,) = (what for what in found if what.startswith("length: status says"))
    assert said.endswith("1 pending") and found[said] == [file.parent.name]
    assert found["length: their row is lost, or is another clip's or key's"] == [lost]
    assert lost in found["index: clips that are not ready to train on"]


@pytest.mark.parametrize("stage", ["recaption", "encode"])
def test_a_row_under_another_clip_s_name(made: Pipeline, stage: str) -> None:
    """Two captions, or two latents, exchanged; the commit agrees."""
    file = with_two(made, stage)
    clips = pq.read_table(file).column("clip_id").to_pylist()
    rewrite(file, lambda t: swapped(t, "clip_id", kept(file)))
    result = again(made)
    found = texts(result)
    mixed = {clips[i] for i in kept(file)[:2]}
    assert set(found[f"{stage}: their row is lost, or is another clip's or key's"]) == mixed
    assert mixed <= set(found["index: clips that are not ready to train on"])


def test_captions_exchanged(made: Pipeline) -> None:
    file = with_two(made, "recaption")
    clips = pq.read_table(file).column("clip_id").to_pylist()
    mixed = {clips[i] for i in kept(file)[:2]}
    rewrite(file, lambda t: swapped(t, "recaption", kept(file)))
    found = texts(again(made))
    assert set(found["index: another caption than the data has"]) == mixed


def test_latents_exchanged(made: Pipeline) -> None:
    """Whole rows of a shard in another order: the index points at another clip's latents."""
    file = with_two(made, "encode")
    a, b = kept(file)[:2]
    clips = pq.read_table(file).column("clip_id").to_pylist()
    order = list(range(len(clips)))
    order[a], order[b] = b, a
    rewrite(file, lambda t: t.take(order))
    assert set(texts(again(made))["index: another row than the data has"]) == {clips[a], clips[b]}


@pytest.mark.parametrize("column", ["recaption", "latents"])
def test_values_exchanged_that_only_the_hash_can_tell(made: Pipeline, column: str) -> None:
    stage = "encode" if column == "latents" else "recaption"
    file = with_two(made, stage)
    name = str(file.relative_to(made.store.root))
    rewrite(file, lambda t: swapped(t, column, kept(file)), forge=False)
    assert texts(again(made))[f"{stage}: a file's sha256 is another than was committed"] == [name]
    quick = audit(dag.build(made.config), quick=True)
    assert f"{stage}: a file's sha256 is another than was committed" not in texts(quick)


@pytest.mark.parametrize("keep", [0, 100])
def test_a_shard_cut_short(made: Pipeline, keep: int) -> None:
    file = data(made, "encode")[0]
    file.write_bytes(file.read_bytes()[:keep])
    found = texts(again(made))
    assert found["encode: a file that counts is missing or can't be read"] == [
        str(file.relative_to(made.store.root))
    ]


def test_a_file_that_is_gone(made: Pipeline) -> None:
    file = data(made, "limit")[0]
    file.unlink()
    found = texts(again(made))
    assert list(found.values()) == [[file.parent.name]]
    assert next(iter(found)).startswith("limit: a unit can't be read") and file.name in str(found)


def test_latents_of_another_length(made: Pipeline) -> None:
    file = with_two(made, "encode")
    row = kept(file)[1]
    clip = pq.read_table(file).column("clip_id")[row].as_py()

    def shorten(table: pa.Table) -> pa.Table:
        values = table.column("latents").to_pylist()
        values[row] = values[row][:-4]
        place = table.column_names.index("latents")
        return table.set_column(place, table.schema.field("latents"), pa.array(values, pa.binary()))

    rewrite(file, shorten)
    assert texts(again(made)) == {"encode: latents of 12 bytes, not float32 x [1, 1, 2, 2]": [clip]}


def test_a_wrong_count_in_a_commit(made: Pipeline) -> None:
    log = made.dag.log(made.store, "limit")
    name = next(n for n in made.store.find(log.prefix) if n.endswith(".json"))
    values = json.loads(made.store.read(name))
    values["counts"]["kept"] += 1
    values["counts"]["total"] += 1
    made.store.put(name, json.dumps(values).encode())
    found = texts(again(made))
    what, ids = next(iter(found.items()))
    assert what.startswith("limit: status says") and ids == [name.split("/")[2]]


def test_an_index_row_of_another_clip(made: Pipeline) -> None:
    file = Path(made.store.path(index.INDEX_NAME))
    table = pq.read_table(file)
    clips = table.column("clip_id").to_pylist()
    pq.write_table(swapped(table, "clip_id", [0, 3]), file)
    found = texts(again(made))
    assert any({clips[0], clips[3]} == set(ids) for ids in found.values())
    assert all(what.startswith("index: another") for what in found)
    pq.write_table(table.slice(1), file)
    assert texts(again(made)) == {"index: clips that are ready and are not in it": [clips[0]]}
    pq.write_table(pa.concat_tables([table, table.slice(2, 1)]), file)
    assert "index: a clip stands twice in one file" in texts(again(made))


def test_a_source_row_lost_or_in_two_units(made: Pipeline) -> None:
    one, other = data(made, "source")[:2]
    first, extra = pq.read_table(one), pq.read_table(other).slice(0, 1)
    rewrite(one, lambda t: t.slice(1))
    assert any(what.startswith("source: status says") for what in texts(again(made)))
    rewrite(one, lambda t: pa.concat_tables([first, extra]))
    found = texts(again(made))
    assert found["source: a clip stands in two units"] == [extra.column("clip_id")[0].as_py()]


def test_a_row_of_nobody(made: Pipeline) -> None:
    file = data(made, "length")[0]

    def foreign(table: pa.Table) -> pa.Table:
        row = table.slice(0, 1).set_column(0, table.schema.field(0), pa.array(["f" * 24]))
        return pa.concat_tables([table, row])

    rewrite(file, foreign)
    assert texts(again(made)) == {"length: rows of clips that the unit never had": ["f" * 24]}


def test_many_ids_are_counted(made: Pipeline) -> None:
    result = Audit({})
    result.found("length", "wrong", *(str(n) for n in range(15)))
    result.found("length", "wrong", *(str(n) for n in range(15, 50)))
    (finding,) = result.findings.values()
    assert finding.ids == [str(n) for n in range(20)] and finding.count == 50


YAML = """\
workdir: ./work
source: {kind: jsonl, path: clips.jsonl}
run: {runner: local}
"""


def test_the_command_prints_a_line_a_stage_and_exits_by_what_it_found(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"no video")
    (tmp_path / "clips.jsonl").write_text('{"path": "a.mp4"}\n{"path": "b.mp4"}\n')
    file = tmp_path / "vidpipe.yaml"
    file.write_text(YAML)
    with_file = ["-c", str(file)]
    assert CliRunner().invoke(cli.cli, ["run", "probe", *with_file]).exit_code == 0
    done = CliRunner().invoke(cli.cli, ["audit", *with_file])
    assert done.exit_code == 0, done.output
    lines = [" ".join(line.split()) for line in done.stdout.splitlines()]
    assert "behind" not in done.output, "no clip is ready, so there is no index to renew"
    assert "source 2 in = 2 kept + 0 rejected + 0 failed + 0 pending ok" in lines
    assert "download 2 in = 1 kept + 0 rejected + 1 failed + 0 pending ok" in lines
    data_file = next((tmp_path / "work" / "download").rglob("*.parquet"))
    data_file.write_bytes(b"")
    done = CliRunner().invoke(cli.cli, ["audit", "--json", *with_file])
    assert done.exit_code == 1
    told = json.loads(done.stdout)
    assert told["findings"][0]["ids"] == [str(data_file.relative_to(tmp_path / "work"))]
    done = CliRunner().invoke(cli.cli, ["audit", *with_file])
    assert "WRONG" in done.stdout and data_file.name in done.stdout
