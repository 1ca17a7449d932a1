from __future__ import annotations

import pytest
from planted import Planted, planted

from stages.captions.quality import Checked, QualitySettings, examine
from stages.captions.verdict import clean

ALL = planted()
GOOD = [p for p in ALL if p.fault == "good"]
BAD = [p for p in ALL if p.fault != "good"]


def look(caption: Planted) -> Checked:
    text = clean(caption.answer)
    return examine(text, QualitySettings(), caption.original or None, caption.truncated)


def test_the_set_is_what_the_figures_are_about() -> None:
    assert len(GOOD) == len({p.answer for p in GOOD}) == 200
    assert len(BAD) == 43 + 47 + 31
    assert [sum(p.part == part for p in GOOD) for part in (1, 2, 3)] == [100, 100, 0]


@pytest.mark.parametrize("caption", BAD, ids=lambda p: p.answer[:40])
def test_every_planted_fault_is_found(caption: Planted) -> None:
    assert caption.fault in look(caption).flags


def test_at_most_two_in_a_hundred_good_captions_are_flagged() -> None:
    flagged = [(p.answer, checked.flags) for p in GOOD if (checked := look(p)).flags]
    assert len(flagged) <= 0.02 * len(GOOD), flagged
