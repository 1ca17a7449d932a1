import json
import tracemalloc

import fsspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifests.sources import (
    SourceError,
    SourceRow,
    SourceSettings,
    extras_schema,
    read,
)


def rows(settings: SourceSettings) -> list[SourceRow]:
    return list(read(settings))


def pairs(settings: SourceSettings) -> list[tuple]:
    return [(row.uri, row.caption) for row in read(settings)]


def schema(settings: SourceSettings) -> dict[str, str]:
    return {field.name: str(field.type) for field in extras_schema(settings)}


def failure(settings: SourceSettings) -> str:
    with pytest.raises(SourceError) as caught:
        rows(settings)
    return str(caught.value)


def test_json_types_nulls_blank_lines_and_large_numbers(table):
    settings = table(
        "a.jsonl",
        '\n{"uri": "a.mp4", "n": 1, "b": true, "big": 123456789012345678901, "late": null}\r\n'
        '\n  \n{"uri": null, "n": 2.5, "b": null, "o": {"x": 1}, "m": 3}\n'
        '{"uri": "", "caption": "", "m": "x"}\n',
    )
    assert schema(settings) == {
        "source_n": "double",
        "source_b": "bool",
        "source_big": "string",
        "source_late": "string",
        "source_m": "string",
    }
    got = rows(settings)
    assert [row.origin for row in got] == ["a.jsonl:2", "a.jsonl:5", "a.jsonl:6"]
    assert [(row.uri, row.caption) for row in got] == [("a.mp4", None), (None, None), (None, "")]
    assert got[0].extras["source_big"] == "123456789012345678901"
    assert [row.extras["source_m"] for row in got] == [None, "3", "x"]


def test_nested_values_that_are_asked_for_are_kept_as_json(table):
    settings = table("a.jsonl", '{"uri": "a", "r": {"h": 1}}', keep=["r"])
    assert rows(settings)[0].extras == {"source_r": '{"h": 1}'}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"uri": "a"}\n{"uri": "b",}\n', "a.jsonl:2:13: not valid JSON"),
        ('{"uri": "a"}\n{"uri": "b"', "a.jsonl:2:12: not valid JSON"),
        ('{"uri": "a"}\n3\n', "a.jsonl:2: 3 stands where an object"),
        ('{"uri": "a"} {"uri": "b"}\n', "a.jsonl:1:14: not valid JSON: Extra data"),
        ("\n\n", "a.jsonl is empty"),
        ('{"uri": 3}', "a.jsonl:1: column 'uri': 3 is no text"),
        ('{"uri": "a", "caption": 3}', "a.jsonl:1: column 'caption': 3 is no text"),
        ('{"uri": "a", "start": 1' + "0" * 400 + "}", "a.jsonl:1: column 'start': 1000"),
        ('{"uri": "a", "start": [1]}', "a.jsonl:1: column 'start': [1] is no time"),
        ('{"uri": "a", "caption": "\\ud800"}', "a.jsonl:1: column 'caption' has half of a surr"),
        ('{"id": "a"}', "Its columns: 'id'"),
        ('{"uri": "a", "n": ' + "1" * 5000 + "}", "a.jsonl:1: not valid JSON"),
        ("[" * 100_000, "a.jsonl:1:2: not valid JSON"),
        ('[{"uri": "a"},\n {"uri": tru}]', "a.jsonl:2:10: not valid JSON: Expecting value"),
        ('[{"uri": "a"},\n {"uri": "b"}', "a.jsonl:2:14: not valid JSON: the list never ends"),
        ('[{"uri": "a"},\n {"uri": "b', "a.jsonl:2:10: not valid JSON: Unterminated string"),
        ('[{"uri": "a"}\n {"uri": "b"}]', "a.jsonl:2:2: not valid JSON: '{' stands where ','"),
        ('[{"uri": "a"}]\nx', "a.jsonl:2:1: text follows after the list"),
        ("[]", "a.jsonl is empty"),
        ("[3]", "a.jsonl:1: 3 stands where an object"),
    ],
)
def test_what_is_wrong_with_json_is_said_with_its_place(table, text, message):
    assert message in failure(table("a.jsonl", text))


def test_later_json_values_must_fit(table):
    first = '{"uri": "a", "n": 1, "caption": "x"}\n' * 1000
    assert "a.jsonl:1001: column 'n': 1.5 is no int" in failure(
        table("a.jsonl", first + '{"uri": "a", "n": 1.5}')
    )
    assert "a.jsonl:1001: column 'n': {'x': 1} is no int" in failure(
        table("a.jsonl", first + '{"uri": "a", "n": {"x": 1}}')
    )
    lists = first + '{"uri": "a", "n": 2.0, "caption": ["y", "z"]}'
    assert "a.jsonl:1001: column 'caption': ['y', 'z'] is a list" in failure(
        table("a.jsonl", lists)
    )
    last = rows(table("a.jsonl", lists, keep={"n": "int", "caption": "str"}))[-1]
    assert (last.caption, last.extras["source_n"]) == ("y", 2)
    assert last.extras["source_caption"] == '["y", "z"]'


def test_a_long_line_is_put_together_from_its_pieces(table):
    caption = "é" * 150_000
    text = "".join(
        json.dumps({"uri": f"{i}.mp4", "caption": caption}, ensure_ascii=False) + "\n"
        for i in range(3)
    )
    settings = table("a.jsonl", text + '{"uri": }')
    assert "a.jsonl:4:9" in failure(settings)
    assert pairs(table("a.jsonl", text)) == [(f"{i}.mp4", caption) for i in range(3)]


def test_a_json_list_streams(table):
    items = ",".join(json.dumps({"path": f"{i}.mp4", "cap": "x" * 200}) for i in range(30_000))
    settings = table("a.json", f"[{items}]")
    tracemalloc.start()
    try:
        count = sum(1 for _ in read(settings))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert (count, peak < 4_000_000) == (30_000, True)


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
PAIRS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=8)


def in_memory(name: str, data: bytes) -> str:
    fsspec.filesystem("memory").pipe_file(f"/sources/{name}", data)
    return f"memory://sources/{name}"


def as_read(uri: str) -> str | None:
    return uri if uri.strip() else None


@given(PAIRS, st.booleans(), st.booleans())
def test_any_json_comes_back_as_it_was_written(clips, ascii_only, one_list):
    items = [{"uri": uri, "caption": caption} for uri, caption in clips]
    dumps = json.JSONEncoder(ensure_ascii=ascii_only).encode
    text = dumps(items) if one_list else "\n".join(map(dumps, items))
    settings = SourceSettings(kind="jsonl", path=in_memory("p.jsonl", text.encode()))
    assert pairs(settings) == [(as_read(uri), caption) for uri, caption in clips]
