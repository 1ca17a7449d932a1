from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from pydantic import ValidationError

from stages.base import Context, Failed, Rejected, StageError
from stages.filter import Filter, FilterSettings, check_rules, parse_rules

COLUMNS = pa.schema(
    [
        ("clip_id", pa.string()),
        ("caption", pa.string()),
        ("end", pa.float64()),
        ("len", pa.int32()),
        ("fps", pa.float64()),
        ("vfr", pa.bool_()),
        ("source_views", pa.string()),
        ("scores", pa.list_(pa.float64())),
    ]
)
ROW = {
    "clip_id": "c",
    "caption": "a dog",
    "end": 4.0,
    "len": 64,
    "fps": 30.0,
    "vfr": False,
    "source_views": "12",
    "scores": [1.0, 2.0],
}


def make(bind: bool = True, **rules: str) -> Filter:
    stage = Filter(FilterSettings(rules=rules), Context("/work"))
    if bind:
        stage.bind(COLUMNS)
    return pickle.loads(pickle.dumps(stage))


def judge(rules: dict[str, str], *rows: dict[str, object]) -> list[object]:
    return list(make(**rules).process([{**ROW, **row} for row in rows]))


def test_the_first_rule_that_is_not_true_rejects() -> None:
    rules = {"len": "len == 64", "fast": "fps >= 24 AND NOT vfr"}
    outcomes = judge(
        rules, {}, {"len": 48}, {"len": 48, "fps": 1.0}, {"fps": 23.976023976}, {"fps": None}
    )
    assert outcomes == [
        {},
        Rejected("len", "len = 48, rule: len == 64"),
        Rejected("len", "len = 48, rule: len == 64"),
        Rejected("fast", "fps = 23.976, vfr = False, rule: fps >= 24 AND NOT vfr"),
        Rejected("fast", "fps is null, vfr = False, rule: fps >= 24 AND NOT vfr"),
    ]


def test_without_rules_all_are_kept() -> None:
    stage = make()
    assert stage.reads == ()
    assert list(stage.process([{"clip_id": "a"}, {"clip_id": "b"}])) == [{}, {}]


def test_a_rule_may_name_no_column() -> None:
    assert judge({"never": "1 > 2"}, {}, {}) == [Rejected("never", "rule: 1 > 2")] * 2


@pytest.mark.parametrize(
    ("rule", "reads"),
    [
        ("len == 64 and fps > 3", ("len", "fps")),
        ('"end" > 3 -- seconds', ("end",)),
        ("caption like '%dog%' and length(caption) < 300", ("caption",)),
        ("list_min(list_transform(scores, lambda len: len + fps)) > 1", ("scores", "fps")),
        ("case when vfr then false else len between 1 and fps + 99 end", ("vfr", "len", "fps")),
        ("not regexp_matches(caption, '(?i)watermark')", ("caption",)),
        ("list_sum(scores) > 1", ("scores",)),
        ("len in (48, 64) or caption is null", ("len", "caption")),
    ],
)
def test_a_rule_reads_the_columns_it_names(rule: str, reads: tuple[str, ...]) -> None:
    stage = make(r=rule)
    assert stage.reads == reads
    assert list(stage.process([ROW])) == [{}]


def test_columns_of_nulls_keep_their_type() -> None:
    nulls = dict.fromkeys(COLUMNS.names)
    rules = {"a": "coalesce(length(caption), 0) = 0", "b": "scores[1] is null", "c": "len > 0"}
    assert judge(rules, nulls) == [Rejected("c", "len is null, rule: len > 0")]


def test_a_value_that_a_rule_cannot_digest_fails_its_row_alone() -> None:
    rules = {"popular": "cast(source_views as int) > 10"}
    kept, failed, rejected = judge(rules, {}, {"source_views": "many"}, {"source_views": "1"})
    assert kept == {}
    assert isinstance(failed, Failed)
    assert failed.error == "rule_error"
    assert "many" in failed.message
    assert rejected == Rejected("popular", "source_views = 1, rule: cast(source_views as int) > 10")


def test_results_do_not_depend_on_the_batch() -> None:
    rows = [{**ROW, "len": n, "source_views": str(n) if n % 7 else "x"} for n in range(50)]
    stage = make(a="len % 3 > 0", b="cast(source_views as int) % 5 <> 2")
    alone = [outcome for row in rows for outcome in stage.process([row])]
    assert list(stage.process(rows)) == alone
    assert {type(o) for o in alone} == {dict, Rejected, Failed}


def test_a_long_value_is_cut_in_the_message() -> None:
    (outcome,) = judge({"short": "length(caption) < 9"}, {"caption": "x" * 5000})
    assert len(outcome.message) < 150
    assert "…" in outcome.message


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        ("len =", "ends too early"),
        ("(len > 1", "ends too early"),
        ("len == == 1", "syntax error at or near"),
        ("len > 'x", "unterminated|syntax error"),
        ("end > 3", 'written "end", in double quotes'),
        ("len > 1; drop table clip", "syntax error"),
        ("", "it is empty"),
        ("exists(select 1)", "a subquery"),
        ("len > (select 3)", "a subquery"),
        ("len in (select 1)", "a subquery"),
        ("row_number() over () > 3", "a window function"),
        ("min(len) > 3", r"min\(\), of the kind aggregate"),
        ("count(*) > 3", "aggregate|one row"),
        ("columns(*) > 3", r"uses \*"),
        ("len = ?", "a parameter"),
        ("$len = 1", "a parameter"),
        ("random() > 0.5", "another value each time"),
        ("now() > '2020-01-01'", "another value each time"),
        ("read_text('/etc/hostname') is null", "of the kind table"),
        ("1 = 1) from (select 1", "more than one condition"),
        ("true), (true", "more than one condition"),
        ("true) where (false", "more than one condition"),
        ("true) union select (true", "single condition"),
        ("true) limit (1", "more than one condition"),
    ],
)
def test_what_is_no_condition_on_one_row_is_refused(rule: str, why: str) -> None:
    with pytest.raises(StageError, match=why) as caught:
        parse_rules({"mine": rule})
    assert "mine" in str(caught.value)
    with pytest.raises(ValidationError, match="mine"):
        FilterSettings(rules={"mine": rule})


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        ("lenn == 64", "no column 'lenn'. Did you mean len?"),
        ("Fps > 3", "Did you mean fps?"),
        ("clip.len > 3", "no column 'clip'"),
        ("current_date > '2020-01-01'::date", "no column 'current_date'"),
        ("len + 1", "gives a INTEGER|gives a BIGINT"),
        ("caption", "gives a VARCHAR"),
        ("nosuch(len) > 3", "nosuch"),
        ("len > 'many'", "many"),
        ("scores > 3", "in: scores > 3"),
    ],
)
def test_what_does_not_fit_the_columns_is_refused(rule: str, why: str) -> None:
    with pytest.raises(StageError, match=why) as caught:
        check_rules({"mine": rule}, COLUMNS)
    assert str(caught.value).startswith("rule mine")
    assert "\n" not in str(caught.value)
    with pytest.raises(StageError, match=why):
        make(mine=rule)


def test_the_order_of_rules_is_in_the_fingerprint() -> None:
    a, b = {"x": "len > 1", "y": "fps > 1"}, {"y": "fps > 1", "x": "len > 1"}
    assert make(**a).fingerprint != make(**b).fingerprint
    assert make(**a).fingerprint == make(bind=False, **a).fingerprint
    assert make(**a).fingerprint != make(x="len > 2", y="fps > 1").fingerprint


def test_the_database_leaves_without_a_word() -> None:
    script = """
from stages.base import Context
from stages.filter import Filter, FilterSettings
print(Filter(FilterSettings(rules={"a": "x > 1"}), Context("/w")).process([{"x": 2}]))
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("[{}]\n", "")
