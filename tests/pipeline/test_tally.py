"""What the driver hears of units whose parts several workers settle."""

from __future__ import annotations

from pipeline.tally import Tally
from pipeline.unit import Receipt


def test_a_unit_is_told_once_each_of_its_parts_is_through() -> None:
    tally = Tally()
    first = Receipt("embed", "u", amounts={"encoded": 3}, seconds={"process": 1.0})
    again = Receipt("embed", "u", seconds={"process": 0.5})
    other = Receipt("embed", "u", amounts={"encoded": 2}, error="no room")
    for number, receipt in ((0, first), (0, again)):  # the second by a worker in a lost one's place
        tally.begin()
        tally.unit(receipt, number, 2)
    assert not tally.drain()[1], "part 1 is at work"
    tally.begin()
    tally.unit(other, 1, 2)
    (told,) = tally.drain()[1]
    assert (told.error, told.amounts, told.seconds) == ("no room", {"encoded": 5}, {"process": 1.5})
    assert not tally.running()
