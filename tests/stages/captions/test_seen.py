"""Descriptions: what a model that was shown frames says of them must not get into a caption."""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.captions.prompt import preset
from stages.captions.verdict import judge
from stages.describe import DescribeQuality
from stages.engines.base import Answer

FILE = Path(__file__).with_name("planted-seen.txt")
LINES = [line.split(" | ", 1) for line in FILE.read_text().splitlines() if line[0] != "#"]
GOOD = [text for fault, text in LINES if fault == "good"]
BAD = [(fault, text) for fault, text in LINES if fault != "good"]


def flags(text: str) -> tuple[str, ...]:
    answer = Answer(text, 100, False)
    return judge(answer, preset("describe-dense"), DescribeQuality(), None).checked.flags


@pytest.mark.parametrize("text", GOOD, ids=lambda text: text[:30])
def test_a_good_description_is_taken(text: str) -> None:
    assert flags(text) == ()


@pytest.mark.parametrize(("fault", "text"), BAD, ids=[text[:40] for _, text in BAD])
def test_words_about_the_frames_are_found(fault: str, text: str) -> None:
    assert fault in flags(text)


def test_captions_of_text_may_speak_of_frames() -> None:
    text = "The bowler throws a strike in the final frame and raises both arms to the crowd."
    answer = Answer(text, 100, False)
    assert judge(answer, preset("rewrite"), DescribeQuality(), None).checked.flags == ()
