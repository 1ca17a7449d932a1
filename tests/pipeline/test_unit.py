"""One unit through stages: what is pending, what is committed, and that the account adds up."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from toys import Echo, Length, Limit, Shout, Words, pipeline

from manifests.intake import scan
from manifests.log import Counts
from manifests.shards import LATENTS, Index, LatentSpec, read_latents
from manifests.store import StoreError
from pipeline import commits, index, query
from pipeline import plan as planning
from pipeline.account import account, summary
from pipeline.config import ConfigError
from pipeline.dag import Pipeline
from pipeline.report import Reporter
from pipeline.run import run
from pipeline.streams import run_piece
from pipeline.unit import Piece, Receipt, Retry
from pipeline.upkeep.repair import repair
from pipeline.upkeep.verify import verify
from stages.base import Failed, Outcome, Rejected, Row

CAPTIONS = ["a red cat", "", "bad", "one two three four five", "dog", None]


class Heard(Reporter):
    """Remembers how many rows each stage settled."""

    def __init__(self) -> None:
        self.settled: dict[str, int] = {}

    def rows(self, stage: str, counts: Counts) -> None:
        self.settled[stage] = self.settled.get(stage, 0) + counts.total


def go(made: Pipeline, *names: str, retry: Retry = Retry()) -> tuple[Heard, dict[str, Counts]]:
    heard = Heard()
    result = run(made, names, retry, heard)
    assert not result.faults, result.faults[0].trace
    for name, counts in result.status.items():
        sums = sum(counts.rejected.values()) + sum(counts.failed.values())
        assert counts.total == counts.kept + sums + counts.pending, name
    return heard, result.status


def rows(made: Pipeline, stage: str) -> list[dict[str, Any]]:
    return sorted(query.select(made, stage).to_pylist(), key=lambda row: row["uri"])


def test_every_row_is_accounted_for(tmp_path: Path) -> None:
    made = pipeline(tmp_path, CAPTIONS)
    heard, status = go(made)
    assert heard.settled == {"length": 6, "limit": 3, "shout": 2}
    assert status["length"] == Counts(6, 3, {"empty": 2}, {"bad_caption": 1})
    assert status["limit"] == Counts(3, 2, {"too_long": 1})
    assert status["shout"] == Counts(2, 2)
    table = rows(made, "shout")
    assert [row["outcome"] for row in table] == [
        "kept", "rejected", "failed", "rejected", "kept", "rejected",
    ]  # fmt: skip
    assert [row["stage"] for row in table] == [
        "shout", "length", "length", "limit", "shout", "length",
    ]  # fmt: skip
    assert [row["loud"] for row in table] == ["A RED CAT!", None, None, None, "DOG!", None]
    assert table[2]["message"] == "the caption says bad"
    assert "blob" not in table[0], "payload must stay out of views"


class Auditing(Reporter):
    """Adds up the account at every step of a run."""

    def __init__(self, made: Pipeline) -> None:
        self.made = made
        self.looks = 0

    def rows(self, stage: str, counts: Counts) -> None:
        self.look()

    def unit(self, receipt: Receipt) -> None:
        self.look()

    def look(self) -> None:
        self.looks += 1
        status = planning.status(self.made)
        assert status["source"].total == len(CAPTIONS) * 3
        above = None
        for counts in status.values():
            settled = sum(counts.rejected.values()) + sum(counts.failed.values())
            assert counts.total == counts.kept + settled + counts.pending
            assert above is None or counts.total == above, "in is what the stage before kept"
            above = counts.kept


def test_the_account_adds_up_at_every_step(tmp_path: Path) -> None:
    made = pipeline(tmp_path, CAPTIONS * 3, settings={"length": {"batch_size": 1}})
    auditing = Auditing(made)
    run(made, (), Retry(), auditing)
    assert auditing.looks > 18


def test_a_second_run_does_nothing(tmp_path: Path) -> None:
    made = pipeline(tmp_path, CAPTIONS)
    go(made)
    before = made.store.find("")
    heard, _ = go(made)
    assert heard.settled == {}
    assert made.store.find("") == before


def test_a_gate_decides_who_goes_on_and_never_what_is_computed(tmp_path: Path) -> None:
    go(pipeline(tmp_path, CAPTIONS))
    heard, status = go(pipeline(tmp_path, CAPTIONS, settings={"limit": {"most": 9}}))
    assert heard.settled == {"limit": 3, "shout": 1}, "only the clip that the gate lets in anew"
    assert status["shout"].kept == 3
    heard, status = go(pipeline(tmp_path, CAPTIONS, settings={"limit": {"most": 1}}))
    assert heard.settled == {"limit": 3}
    assert status["shout"] == Counts(1, 1)
    heard, _ = go(pipeline(tmp_path, CAPTIONS))
    assert heard.settled == {}, "back at the old threshold, everything is there already"


def test_settings_that_matter_recompute_and_those_for_speed_do_not(tmp_path: Path) -> None:
    go(pipeline(tmp_path, CAPTIONS))
    fast = {"length": {"noise": 5, "batch_size": 1, "workers": 7}}
    assert go(pipeline(tmp_path, CAPTIONS, settings=fast))[0].settled == {}
    heard, _ = go(pipeline(tmp_path, CAPTIONS, settings={"length": {"factor": 2}}))
    # Six words of the first are too many now, two of the last still pass: nothing new to shout.
    assert heard.settled == {"length": 6, "limit": 3}
    heard, _ = go(pipeline(tmp_path, CAPTIONS, settings={"shout": {"mark": "?"}}))
    assert heard.settled == {"shout": 2}


def test_new_changed_and_gone_rows_cost_only_themselves(tmp_path: Path) -> None:
    go(pipeline(tmp_path, CAPTIONS))
    heard, status = go(pipeline(tmp_path, [*CAPTIONS, "new one", "new two"]))
    assert heard.settled == {"length": 2, "limit": 2, "shout": 2}
    assert status["source"].total == 8
    heard, status = go(pipeline(tmp_path, ["a blue cat", *CAPTIONS[1:]]))
    # As many words as before: what the gate reads of the clip has not changed.
    assert heard.settled == {"length": 1, "shout": 1}
    assert status["source"].total == 6 and status["shout"].total == 2
    heard, status = go(pipeline(tmp_path, CAPTIONS))
    assert heard.settled == {}, "what came back is what it was"
    assert status["shout"].total == 2


def test_batch_size_changes_nothing_but_speed(tmp_path: Path) -> None:
    tables = []
    for size in (1, 8):
        folder = tmp_path / str(size)
        folder.mkdir()
        made = pipeline(folder, CAPTIONS * 3, settings={"length": {"batch_size": size}})
        go(made)
        tables.append(query.select(made, None))
    assert tables[0].equals(tables[1])


def test_failed_rows_are_tried_again_on_request(tmp_path: Path) -> None:
    made = pipeline(tmp_path, CAPTIONS)
    go(made)
    assert go(made)[0].settled == {}
    assert go(made, retry=Retry(True))[0].settled == {}, "a final class: nothing would change"
    heard, status = go(made, retry=Retry(True, frozenset({"all"})))
    assert heard.settled == {"length": 1}
    assert status["length"].failed == {"bad_caption": 1}
    heard, _ = go(made, retry=Retry(True, frozenset({"bad_caption"})))
    assert heard.settled == {"length": 1}
    view = next(v for v in planning.views(made) if "bad" in v.table.column("caption").to_pylist())
    settled = view.settled("length")
    assert settled.attempts[settled.outcome.index("failed").as_py()].as_py() == 3


class Flaky(Length):
    """One of its failure classes may pass."""

    transient = ("busy_5??",)

    def one(self, caption: str | None) -> Outcome:
        if caption and caption.startswith("busy"):
            return Failed(caption, "try again")
        return super().one(caption)


def test_what_is_worth_another_try_is_what_the_stage_says(tmp_path: Path) -> None:
    captions = ["a cat", "busy_503", "busy_404", "bad", "killed_worker", "busy_500"]
    made = pipeline(tmp_path, captions, stages=(Flaky,))
    flaky = made.stages["length"]
    assert [flaky.worth_retry(c) for c in captions] == [False, True, False, False, True, True]
    _, status = go(made)
    assert planning.worth_retry(made, status) == {"length": 2}
    assert account(made)["stages"][1]["worth_retry"] == 2
    told = summary(made, status, ["length"])
    assert (
        told[-1] == "2 failed rows are worth another try as things are: vidpipe run --retry-failed"
    )
    assert planning.plan(made, ["length"], Retry(True)).stages["length"].retried == 2
    assert go(made, retry=Retry(True))[0].settled == {"length": 2}
    assert go(made, retry=Retry(True, frozenset({"busy_404", "bad_caption"})))[0].settled == {
        "length": 2
    }
    assert go(made, retry=Retry(True, frozenset({"all"})))[0].settled == {"length": 4}
    with pytest.raises(ConfigError, match="Failed rows: 1 bad_caption, 1 busy_404, 1 busy_500"):
        go(made, retry=Retry(True, frozenset({"busy_405"})))


def test_an_exception_settles_nothing_and_is_told(tmp_path: Path) -> None:
    made = pipeline(tmp_path, ["crash", "fine words here"])
    result = run(made, (), Retry(), Reporter())
    assert [(r.stage, r.error) for r in result.faults] == [
        ("length", "ZeroDivisionError: a fault of the stage")
    ]
    assert "toys.py" in (result.faults[0].trace or "")
    assert result.status["length"] == Counts(2, 0, pending=2)


@pytest.mark.parametrize(
    ("answer", "told"),
    [
        ([], "gave 0 outcomes for 2 rows"),
        ([{"words": 1}, {"words": 2}], "declares a column 'blob'"),
        ([{"words": "many", "blob": b""}] * 2, "another type than declared"),
        ([None, None], "gave a NoneType"),
        ([Rejected("")] * 2, "gave no reason why it did not keep clip"),
        ([Failed("", "sorry")] * 2, "gave no reason why it did not keep clip"),
        ([[], []], "gave a list"),
    ],
)
def test_a_stage_that_breaks_its_contract_is_told_apart(
    tmp_path: Path, answer: list[Outcome], told: str
) -> None:
    class Broken(Length):
        def process(self, rows: list[Row], model: None) -> list[Outcome]:
            return answer

    made = pipeline(tmp_path, ["a", "b"], [Broken])
    result = run(made, (), Retry(), Reporter())
    assert told in (result.faults[0].error or "")
    assert result.status["length"].pending == 2


def test_large_units_are_committed_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commits, "COMMIT_BYTES", 400)
    made = pipeline(tmp_path, ["word"] * 9, [Length], {"length": {"batch_size": 2}})
    made.config.run.model_copy()
    scan(made.store, made.config.source, 9)
    _, status = go(made)
    assert status["length"] == Counts(9, 9)
    log = made.dag.log(made.store, "length")
    (only,) = log.units()
    done = log.commits(only)
    assert [c.rows for c in done] == [4, 4, 1]
    assert [c.counts.pending for c in done] == [5, 1, 0]


def test_slow_work_is_committed_from_time_to_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = pipeline(tmp_path, ["word"] * 6, [Length], {"length": {"batch_size": 2}})
    scan(made.store, made.config.source, 6)
    monkeypatch.setattr(commits, "COMMIT_SECONDS", 0.0)
    go(made)
    log = made.dag.log(made.store, "length")
    assert [[c.rows for c in log.commits(name)] for name in log.units()] == [[2, 2, 2]]


def test_two_workers_on_one_unit_leave_each_row_once(tmp_path: Path) -> None:
    made = pipeline(tmp_path, ["a", "b", "c"], [Length])
    scan(made.store, made.config.source)
    (name,) = made.dag.log(made.store, "source").units()

    class Meddled(Length):
        """While it works, another worker settles the same unit."""

        def process(self, rows: list[Row], model: None) -> list[Outcome]:
            other = made.stages["length"]
            run_piece(made.store, made.dag, other, other.setup, Piece(name))
            return super().process(rows, model)

    slow = Meddled(made.stages["length"].settings, made.stages["length"].context)
    receipt = run_piece(made.store, made.dag, slow, slow.setup, Piece(name))
    assert receipt.error is None
    log = made.dag.log(made.store, "length")
    done = log.commits(name)
    assert [c.rows for c in done] == [3], "the loser's rows are dropped"
    assert len([n for n in made.store.find(log.prefix) if n.endswith(".parquet")]) == 1
    assert planning.status(made)["length"] == Counts(3, 3)


def test_two_drivers_that_take_in_the_source_at_once_take_it_in_once(tmp_path: Path) -> None:
    made = pipeline(tmp_path, CAPTIONS)
    ready = threading.Barrier(2)

    def take_in(size: int) -> None:
        ready.wait()
        scan(made.store, made.config.source, size)

    threads = [threading.Thread(target=take_in, args=(size,)) for size in (2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    _, status = go(made)
    assert status["source"] == Counts(6, 6)
    assert len({r["clip_id"] for r in query.select(made, None).to_pylist()}) == 6


def test_units_of_a_scan_that_broke_off_do_not_count(tmp_path: Path) -> None:
    made = pipeline(tmp_path, CAPTIONS)
    scan(made.store, made.config.source, 2)
    (record,) = made.store.find("source/scans")
    made.store.delete(record)
    assert planning.status(made)["source"] == Counts()
    _, status = go(made)
    assert status["source"] == Counts(6, 6)


def test_other_columns_read_make_other_results(tmp_path: Path) -> None:
    class Wider(Shout):
        reads = ("caption", "uri")

    go(pipeline(tmp_path, CAPTIONS))
    made = pipeline(tmp_path, CAPTIONS, [Length, Limit, Wider])
    assert planning.status(made)["shout"] == Counts(2, pending=2)
    assert go(made)[0].settled == {"shout": 2}


@pytest.mark.parametrize("text", ["", "{", "{}", "null", "[]", '{"seq": 1}'])
def test_a_damaged_record_is_named(tmp_path: Path, text: str) -> None:
    made = pipeline(tmp_path, CAPTIONS)
    go(made)
    for prefix in ("shout", "source/scans"):
        name = next(n for n in reversed(made.store.find(prefix)) if n.endswith(".json"))
        whole = made.store.read(name)
        made.store.fs.pipe_file(made.store.path(name), text.encode())
        with pytest.raises(StoreError, match=Path(name).name):
            planning.status(made)
        made.store.fs.pipe_file(made.store.path(name), whole)


def test_a_split_stays_in_its_unit_and_parts_flow_on(tmp_path: Path) -> None:
    made = pipeline(tmp_path, ["a red cat", "", "dog"], [Length, Words, Echo, Limit, Shout])
    _, status = go(made)
    assert status["words_of"] == Counts(2, 2), "its account is of what went in"
    assert status["echo"] == Counts(4, 4)
    assert status["shout"] == Counts(2, 2), "stages beside the split see whole clips"
    table = [r for r in query.select(made, "echo").to_pylist() if r["outcome"] == "kept"]
    assert sorted(r["echoed"] for r in table) == ["aa", "catcat", "dogdog", "redred"]
    assert {r["loud"] for r in table if r["word"] in ("a", "red", "cat")} == {"A RED CAT!"}
    assert len({r["clip_id"] for r in table}) == 4
    assert go(made)[0].settled == {}


def test_rows_without_uri_and_repeats_are_in_the_account(tmp_path: Path) -> None:
    made = pipeline(tmp_path, ["one", "two"])
    table = tmp_path / "clips.jsonl"
    first = table.read_text()
    table.write_text(first + '{"path": "0.mp4", "text": "again"}\n{"path": "", "text": "none"}\n')
    _, status = go(made)
    assert status["source"] == Counts(4, 2, {"duplicate": 1, "no_uri": 1})
    assert status["length"].total == 2
    told = {r["reason"]: r["message"] for r in query.select(made, "length").to_pylist()}
    assert "clips.jsonl:3 repeats the clip of " in told["duplicate"]
    assert "clips.jsonl:4 names no video" in told["no_uri"]


def test_counts_of_old_inputs_are_not_taken_for_new(tmp_path: Path) -> None:
    """Rows settled while a gate was open count when it is set back."""
    shut, wide = {"limit": {"most": 1}}, {"limit": {"most": 9}}
    go(pipeline(tmp_path, CAPTIONS, settings=shut), "limit")
    made = pipeline(tmp_path, CAPTIONS, settings=shut)
    assert planning.status(made)["shout"] == Counts(1, pending=1)
    go(pipeline(tmp_path, CAPTIONS, settings=wide))
    status = planning.status(made)["shout"]
    assert status == Counts(1, 1)


def test_a_source_column_may_change_its_type(tmp_path: Path) -> None:
    made = pipeline(tmp_path, [])
    for score in (3, "three", 4.5):
        rows = [{"path": f"{i}.mp4", "text": "a b", "score": score} for i in range(3)]
        (tmp_path / "clips.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
        _, status = go(made)
        assert status["shout"] == Counts(3, 3)
        assert query.select(made, None).column("source_score").to_pylist() == [score] * 3


def test_the_index_comes_back_after_nothing_was_kept(tmp_path: Path) -> None:
    class Encode(Shout):
        name = "encode"
        adds = LATENTS

        def metadata(self, model: str) -> dict[str, Any]:
            return {"spec": spec}

        def process(self, rows: list[Row], model: str) -> list[Outcome]:
            made = {"latents": b"1234", "latents_shape": [1, 1, 1, 1], "latents_dtype": "float32"}
            return [{**dict.fromkeys(LATENTS.names), **made, "frame_times": [0.0]} for _ in rows]

    spec = LatentSpec("v", "AutoencoderKL", "", "f", False, 1, 1, 8, [0.0], [1.0]).to_json()
    stages = [Length, Limit, Encode]

    def clips(most: int) -> list[str]:
        made = pipeline(tmp_path, CAPTIONS, stages, {"limit": {"most": most}})
        go(made)
        if not made.store.find(index.INDEX_NAME):
            return []
        opened = Index.open(index.path(made))
        for shard, row, clip in zip(
            *(opened.table.column(n).to_pylist() for n in ("shard", "row", "clip_id"))
        ):
            (latent,) = read_latents(opened.workdir, shard, [row])
            assert latent.clip_id == clip and bytes(latent.data) == b"1234"
        return sorted(opened.table.column("caption").to_pylist())

    assert clips(3) == ["a red cat", "dog"]
    assert clips(0) == []
    assert clips(3) == ["a red cat", "dog"]
    assert clips(1) == ["dog"]


def test_a_section_that_is_none_is_rejected(tmp_path: Path) -> None:
    made = pipeline(tmp_path, ["one"])
    rows = [{"path": "a.mp4", "text": "x", "start": s, "end": e} for s, e in ((3, 2), (-1, None))]
    (tmp_path / "clips.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    _, status = go(made)
    assert status["source"] == Counts(2, 0, {"bad_section": 2})


def test_the_view_keeps_types_of_empty_columns(tmp_path: Path) -> None:
    made = pipeline(tmp_path, ["", ""])
    go(made)
    table = query.select(made, "shout")
    assert table.schema.field("words").type == pa.int64()
    assert table.schema.field("loud").type == pa.string()
    assert Limit.name in made.dag.ancestors[Shout.name]


def test_missing_data_is_noticed_before_anything_is_made_of_it(tmp_path: Path) -> None:
    made = pipeline(tmp_path, CAPTIONS)
    go(made)
    data = next(n for n in made.store.find("length") if n.endswith(".parquet"))
    made.store.delete(data)
    for look in (planning.status, lambda made: run(made, (), Retry(), Reporter())):
        with pytest.raises(StoreError, match=f"{Path(data).name}.*verify --repair"):
            look(made)


def test_a_run_of_many_units_leaves_a_snapshot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("manifests.log._LOOSE_COMMITS", 4)
    made = pipeline(tmp_path, CAPTIONS * 5, run={"unit_size": 4})
    go(made)
    loose = [n for n in made.store.find("") if n.endswith(".json") and "/scans/" not in n]
    status, table = planning.status(made), query.select(made, None)
    assert made.store.find("length/" + made.dag.layers["length"].fingerprint + "/snapshots")
    for name in loose:
        made.store.delete(name)
    made = pipeline(tmp_path, CAPTIONS * 5, run={"unit_size": 4})
    assert planning.status(made) == status
    assert query.select(made, None).equals(table)
    assert go(made)[0].settled == {}


def test_parts_of_a_unit_are_settled_side_by_side(tmp_path: Path) -> None:
    made = pipeline(tmp_path, CAPTIONS * 4, [Length])
    scan(made.store, made.config.source, 100)
    (name,) = made.dag.log(made.store, "source").units()
    stage = made.stages["length"]
    receipts = [
        run_piece(made.store, made.dag, stage, stage.setup, Piece(name, part=(number, 3)))
        for number in (2, 0, 1)
    ]
    assert sum(r.counts.total for r in receipts) == 24
    assert all(0 < r.counts.total < 24 for r in receipts)
    done = made.dag.log(made.store, "length").commits(name)
    assert [c.counts.pending for c in done][-1] == 0
    assert planning.status(made)["length"] == Counts(24, 12, {"empty": 8}, {"bad_caption": 4})


def test_what_another_driver_settled_between_two_commits_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(commits, "COMMIT_SECONDS", 0.0)
    made = pipeline(tmp_path, ["word"] * 8, [Length], {"length": {"batch_size": 2}})
    scan(made.store, made.config.source, 8)
    (name,) = made.dag.log(made.store, "source").units()
    other = made.stages["length"]

    class Overtaken(Length):
        """After its first commit another driver settles all that is left."""

        calls = 0

        def process(self, rows: list[Row], model: None) -> list[Outcome]:
            Overtaken.calls += 1
            if Overtaken.calls == 2:
                run_piece(made.store, made.dag, other, other.setup, Piece(name))
            return super().process(rows, model)

    slow = Overtaken(other.settings, other.context)
    assert run_piece(made.store, made.dag, slow, slow.setup, Piece(name)).error is None
    log = made.dag.log(made.store, "length")
    assert sum(c.rows for c in log.commits(name)) == 8, "a clip stands twice"
    assert planning.status(made)["length"] == Counts(8, 8)


def test_batches_before_a_fault_are_kept(tmp_path: Path) -> None:
    captions = ["word"] * 5 + ["crash"]
    made = pipeline(tmp_path, captions, [Length], {"length": {"batch_size": 2}})
    scan(made.store, made.config.source, 6)
    result = run(made, (), Retry(), Reporter())
    assert "ZeroDivisionError" in (result.faults[0].error or "")
    assert result.status["length"] == Counts(6, 4, pending=2)


def test_a_split_that_changes_beside_a_stage_leaves_its_keys_alone(tmp_path: Path) -> None:
    stages = [Length, Words, Echo, Limit, Shout]
    made = pipeline(tmp_path, ["a red cat", "two words"], stages)
    go(made)
    (tmp_path / "clips.jsonl").write_text(
        '{"path": "0.mp4", "text": "a red cat"}\n{"path": "1.mp4", "text": "three words now"}\n'
    )
    _, status = go(made)
    assert status["echo"] == Counts(6, 6)
    assert status["shout"] == Counts(2, 2)
    table = query.select(made, "echo")
    loud = {r["word"]: r["loud"] for r in table.to_pylist()}
    assert loud["cat"] == "A RED CAT!" and loud["now"] == "THREE WORDS NOW!"


def test_a_unit_of_which_nothing_is_left_is_missed(tmp_path: Path) -> None:
    made = pipeline(tmp_path, CAPTIONS)
    go(made)
    log = made.dag.log(made.store, "source")
    unit_ = sorted(log.units())[0]
    for name in made.store.find(f"{log.prefix}/{unit_}"):
        made.store.delete(name)
    with pytest.raises(StoreError, match=rf"{unit_}.*verify --repair"):
        planning.status(made)
    damages = list(verify(made))
    assert [d.unit for d in damages] == [unit_]
    repair(made, damages)
    assert list(verify(made)) == []
    _, status = go(made)
    assert status["source"] == Counts(6, 6)


def test_a_gap_in_a_log_is_an_error_and_no_endless_loop(tmp_path: Path) -> None:
    made = pipeline(tmp_path, CAPTIONS)
    go(made)
    go(made, retry=Retry(True, frozenset({"bad_caption"})))
    log = made.dag.log(made.store, "length")
    (twice,) = [u for u in log.units() if len(log.commits(u)) == 2]
    made.store.delete(f"{log.prefix}/{twice}/000000.json")
    for look in (planning.status, lambda made: run(made, (), Retry(), Reporter())):
        with pytest.raises(StoreError, match=r"has no commit 000000.*verify --repair"):
            look(made)
    repair(made, list(verify(made)))
    assert go(made)[1]["length"].total == 6
