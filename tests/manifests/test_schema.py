"""Ids and keys: equal exactly where what they stand for is."""

from __future__ import annotations

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from manifests.schema import clip_id, row_key, row_keys


def test_ids_are_those_of_ever() -> None:
    """A change here would compute every workdir anew."""
    assert clip_id("a.mp4") == "fdb5019ca87b295bdb568d77"
    assert clip_id('ü "x".mp4', 1.0, 2.5) == "1dd9aa372327471f5c9be1b2"
    assert row_key(["a", None, 1, 1.5, True, [b"x"]]) == "d8ed1841687d60dd"


VALUES = {
    pa.string(): st.text(),
    pa.int64(): st.integers(-(1 << 63), (1 << 63) - 1),
    pa.float64(): st.floats(),
    pa.bool_(): st.booleans(),
    pa.binary(): st.binary(),
    pa.list_(pa.float64()): st.lists(st.floats(allow_nan=False), max_size=3),
}


@pytest.mark.parametrize("kind", VALUES, ids=str)
@settings(deadline=None)  # the first example pays for imports
@given(data=st.data())
def test_keys_of_a_table_are_those_of_its_rows(kind: pa.DataType, data: st.DataObject) -> None:
    values = data.draw(st.lists(st.none() | VALUES[kind], min_size=1, max_size=5))
    table = pa.table({"a": pa.array(values, kind), "b": ["x"] * len(values)})
    for columns in (["a"], ["a", "b"], ["b", "a"], []):
        rows = (
            zip(*(table.column(c).to_pylist() for c in columns)) if columns else [()] * len(table)
        )
        assert row_keys(table, columns).to_pylist() == [row_key(row) for row in rows]
        assert row_keys(table.slice(1), columns).equals(row_keys(table, columns)[1:])
