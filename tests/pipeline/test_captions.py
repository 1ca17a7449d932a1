"""`vidpipe captions check`: flags are counted, and captions that many clips share are found."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from toys import Length, Limit, Shout, Words, pipeline

from pipeline.captions import check
from pipeline.commands import captions as cli_captions
from pipeline.config import ConfigError
from pipeline.dag import Pipeline
from pipeline.query import select
from pipeline.report import Reporter
from pipeline.run import run
from pipeline.unit import Retry
from stages.base import Outcome, Rejected, Row
from stages.captions.verdict import columns

# "a red cat" on five clips, but for case and punctuation; "a dog" on two; the rest once.
MANY = ["a red cat", "A red cat.", "a  RED cat", "a red cat!", "a red cat", "a dog", "A dog"]
SHORT = [*MANY, "two pigs", "no", None, "", "a cow"]


class Recaption(Shout):
    """Says what it is told; refuses `no`, and needs a second try for pigs."""

    name = "recaption"
    adds = columns("recaption")

    def process(self, rows: list[Row], model: str) -> list[Outcome]:
        return [self.told(row["caption"]) for row in rows]

    def told(self, caption: str) -> Outcome:
        if caption == "no":
            return Rejected("caption_refusal", "it says no")
        pigs = "pigs" in caption
        return {
            **dict.fromkeys(self.adds.names),
            "recaption": caption,
            "recaption_source": "original" if pigs else "model",
            "recaption_attempts": 3 if pigs else 1,
            "recaption_flags": ["meta", "too_long"] if pigs else [],
        }


def made(folder: Path, *more: type) -> Pipeline:
    one = pipeline(folder, SHORT, (Length, Limit, Recaption, *more), {}, {"unit_size": 4})
    assert not run(one, (), Retry(), Reporter()).faults
    return one


def test_captions_that_clips_share_are_found_over_all_units(tmp_path: Path) -> None:
    one = made(tmp_path, Words)  # which splits the clips further on: they are counted whole
    found = check(one)
    assert (found.column, found.clips, found.distinct, found.shared) == ("recaption", 9, 4, 7)
    assert [(r.clips, r.text) for r in found.repeated] == [(5, "a red cat"), (2, "a dog")]
    assert len(set(found.repeated[0].examples)) == 3
    assert [r.clips for r in check(one, top=1).repeated] == [5]


def test_flags_fallbacks_and_rejections_are_counted(tmp_path: Path) -> None:
    found = check(made(tmp_path))
    assert found.sources == {"model": 8, "original": 1}
    assert found.flags == {"meta": 1, "too_long": 1}
    assert found.attempts == {1: 8, 3: 1}
    assert found.rejected == {"caption_refusal": 1}


def test_flagged_captions_can_be_looked_at(tmp_path: Path) -> None:
    where = "list_contains(recaption_flags, 'meta') OR recaption_source = 'original'"
    rows = select(made(tmp_path), "recaption", where, ["caption", "recaption_flags"]).to_pylist()
    assert rows == [{"caption": "two pigs", "recaption_flags": ["meta", "too_long"]}]


def test_any_column_of_text_may_be_looked_at(tmp_path: Path) -> None:
    one = made(tmp_path)
    source = check(one, "caption")
    assert source.clips >= 10 and source.repeated[0].clips == 5
    assert not source.flags
    with pytest.raises(ConfigError, match=r"captoin.*Did you mean caption\?"):
        check(one, "captoin")
    with pytest.raises(ConfigError, match="no such column of text"):
        check(one, "recaption_words")


def test_the_command_tells_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = made(tmp_path)
    monkeypatch.setattr(cli_captions, "load", lambda file, overrides: one)
    told = CliRunner().invoke(cli_captions.captions, ["check"])
    assert told.exit_code == 0, told.output
    lines = [" ".join(line.split()) for line in told.output.splitlines()]
    assert "clips whose caption others have too 7 77.8%" in lines
    assert "flag meta 1 11.1%" in lines
    assert any(line.startswith("5 a red cat") for line in lines)
    as_json = CliRunner().invoke(cli_captions.captions, ["check", "--json", "--top", "1"])
    assert json.loads(as_json.output)["repeated"][0]["clips"] == 5
