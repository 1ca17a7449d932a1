import csv
import io
import tracemalloc
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from manifests.sources import (
    SourceError,
    SourceRow,
    SourceSettings,
    extras_schema,
    read,
    resolve_root,
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


def test_captions_with_commas_quotes_and_line_breaks_round_trip(table):
    captions = ['a, "b"', "two\nlines", "three\r\nlines\rhere", "", "é 猫 🎬", " blank "]
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["video", "caption"])
    writer.writerows((f"{i}.mp4", c) for i, c in enumerate(captions))
    got = rows(table("a.csv", "\ufeff" + text.getvalue()))
    assert [row.caption for row in got] == captions
    # A row is where it begins, however many lines it takes.
    assert [row.origin for row in got] == [f"a.csv:{n}" for n in (2, 3, 5, 8, 9, 10)]


def test_empty_uris_are_rows_and_blank_lines_are_none(table):
    settings = table("a.csv", "uri,caption\n,x\n\n   ,y\nb.mp4,\n")
    assert [(r.uri, r.caption, r.origin) for r in read(settings)] == [
        (None, "x", "a.csv:2"),
        (None, "y", "a.csv:4"),
        ("b.mp4", "", "a.csv:5"),
    ]


def test_types_are_inferred_from_the_cells(table):
    settings = table(
        "a.csv",
        "path,n,x,flag,id,big,empty,mixed,n a n\n"
        "a.mp4,1,1,true,007,99999999999999999999,,1,nan\n"
        "b.mp4,-2,2.5,False,8,1,,x,1.5\n"
        "c.mp4,,,,,,,,\n",
    )
    assert schema(settings) == {
        "source_n": "int64",
        "source_x": "double",
        "source_flag": "bool",
        "source_id": "string",
        "source_big": "string",
        "source_empty": "string",
        "source_mixed": "string",
        "source_n_a_n": "double",
    }
    got = rows(settings)
    assert got[1].extras["source_n"] == -2
    assert got[0].extras["source_x"] == 1.0
    assert [r.extras["source_flag"] for r in got] == [True, False, None]
    assert got[0].extras["source_id"] == "007"
    assert got[0].extras["source_big"] == "99999999999999999999"
    assert (got[2].extras["source_n"], got[2].extras["source_empty"]) == (None, "")


def test_a_later_value_that_does_not_fit_names_its_line_and_column(table):
    text = "path,n\n" + "a.mp4,1\n" * 1000 + "b.mp4,1.5\n"
    message = failure(table("a.csv", text))
    assert "a.csv:1002: column 'n': '1.5' is no int" in message
    assert "keep: {n: str}" in message
    assert rows(table("a.csv", text, keep={"n": "str"}))[-1].extras == {"source_n": "1.5"}
    assert rows(table("a.csv", text, keep={"n": "float"}))[-1].extras == {"source_n": 1.5}


def test_keep_chooses_columns_and_types(table):
    text = "path,text,a b,c,d\nx.mp4,t,1,2,3\n"
    assert schema(table("a.csv", text, keep=["d", "a b"])) == {
        "source_d": "int64",
        "source_a_b": "int64",
    }
    typed = table("a.csv", text, keep={"c": "bool", "text": "str"})
    assert "column 'c': '2' is no bool" in failure(typed)
    assert schema(table("a.csv", text, keep=[])) == {}
    message = failure(table("a.csv", text, keep=["a_b"]))
    assert "has no column 'a_b', which `keep` names. Did you mean 'a b'?" in message


def test_names_that_become_one_are_an_error(table):
    message = failure(table("a.csv", "path,Motion Score,motion_score\na.mp4,1,2\n"))
    assert "'Motion Score' and 'motion_score' would both be named source_motion_score" in message


def test_pandas_unnamed_index_column_is_left_out(table):
    settings = table("a.csv", ",path,text\n0,a.mp4,x\n")
    assert pairs(settings) == [("a.mp4", "x")]
    assert schema(settings) == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,text\na.mp4,x\nb.mp4,x,y\n", "a.csv:3: cells in the row: 3, in the header: 2"),
        ("path,text\na.mp4\n", "a.csv:2: cells in the row: 1, in the header: 2"),
        ('path,text\na.mp4,"x\ny"z\n', "a.csv:2: the row that begins here is not valid CSV, as s"),
        ('path,text\na.mp4,x\nb.mp4,"never\nends\n', "a.csv:3: the row that begins here"),
        ("", "a.csv is empty: its first line must name the columns"),
        ("\n\n", "a.csv is empty"),
        ("path,text,path\na,b,c\n", "a.csv:1: the columns 1 and 3 are both named 'path'"),
        ("a,b\n1,2\n", "Its columns: 'a', 'b'. Name one: `columns: {uri: ...}`"),
        ("v/a.mp4,a cat\nv/b.mp4,a dog\n", "Line 1 looks like data"),
        ("path;text\na.mp4;x\n", 'set `delimiter: ";"`'),
        ("path,text\na.mp4,\0\n", "a.csv:2:7: a NUL character"),
        ("path,start\na.mp4,1\nb.mp4,soon\n", "a.csv:3: column 'start': 'soon' is no time"),
        ("path,end\na.mp4,nan\n", "a.csv:2: column 'end': 'nan' is no time"),
        ("path,end\na.mp4,1e999\n", "a.csv:2: column 'end': '1e999' is no time"),
    ],
)
def test_what_is_wrong_with_a_csv_is_said_with_its_place(table, tmp_path, text, message):
    assert message in (said := failure(table("a.csv", text)))
    assert str(tmp_path / "a.csv") in said


def test_latin_1_names_the_byte_and_reads_with_its_encoding(table):
    data = "path,text\na.mp4,x\nb.mp4,né\n".encode("latin-1")
    message = failure(table("a.csv", data))
    assert "a.csv:3:8: byte 0xe9 is not valid utf-8" in message
    assert "set `encoding`" in message
    assert pairs(table("a.csv", data, encoding="latin-1"))[1] == ("b.mp4", "né")


def test_utf_16_reads_with_its_encoding_and_says_so_without(table):
    data = "path,text\na.mp4,né\n".encode("utf-16")
    assert "a.csv:1:1: byte 0xff" in failure(table("a.csv", data))
    assert pairs(table("a.csv", data, encoding="utf-16")) == [("a.mp4", "né")]
    assert "this is not utf-16 text" in failure(table("a.csv", data[:-1], encoding="utf-16"))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_any_line_end(table, end):
    settings = table("a.csv", end.join(["path,text", "a.mp4,x", '"b.mp4",y', ""]))
    assert pairs(settings) == [("a.mp4", "x"), ("b.mp4", "y")]
    assert rows(settings)[1].origin == "a.csv:3"


def test_tabs_only_in_tsv_unless_set(table):
    assert pairs(table("a.tsv", "path\ttext\na.mp4\tx, y\n")) == [("a.mp4", "x, y")]
    assert pairs(table("a.csv", "path|text\na.mp4|x\n", delimiter="|")) == [("a.mp4", "x")]
    assert r'set `delimiter: "\t"`' in failure(table("a.csv", "path\ttext\na.mp4\tx\n"))


def test_a_caption_longer_than_the_csv_modules_limit(table):
    long = "x" * 200_000
    assert pairs(table("a.csv", f"path,text\na.mp4,{long}\n")) == [("a.mp4", long)]


def test_a_large_csv_streams(table):
    settings = table(
        "a.csv", "path,text,n\n" + "".join(f"{i}.mp4,{'x' * 100},{i}\n" for i in range(100_000))
    )
    assert Path(settings.path).stat().st_size > 11_000_000
    tracemalloc.start()
    try:
        count = sum(1 for _ in read(settings))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert count == 100_000
    assert peak < 4_000_000


TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
PAIRS = st.lists(st.tuples(TEXT, TEXT), min_size=1, max_size=8)


def in_memory(name: str, data: bytes) -> str:
    fsspec.filesystem("memory").pipe_file(f"/sources/{name}", data)
    return f"memory://sources/{name}"


def as_read(uri: str) -> str | None:
    return uri if uri.strip() else None


@given(PAIRS)
def test_any_csv_comes_back_as_it_was_written(clips):
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerows([("uri", "caption"), *clips])
    settings = SourceSettings(kind="csv", path=in_memory("p.csv", text.getvalue().encode()))
    assert pairs(settings) == [(as_read(uri), caption) for uri, caption in clips]


def test_parquet_reads_only_what_it_keeps(table):
    settings = table(
        "a.parquet",
        pa.table(
            {
                "video": ["a.mp4", None],
                "caption": ["x", None],
                "start": [1.0, float("nan")],
                "score": pa.array([1.5, 2.5], pa.float32()),
                "n": pa.array([1, 2], pa.uint8()),
                "when": pa.array([0, 1], pa.timestamp("ns")),
                "label": pa.array(["l", "m"]).dictionary_encode(),
                "payload": [b"x", b"y"],
                "box": [[1, 2], [3]],
                "__index_level_0__": [0, 1],
            }
        ),
    )
    assert schema(settings) == {
        "source_score": "double",
        "source_n": "int64",
        "source_when": "string",
        "source_label": "string",
    }
    first, second = rows(settings)
    assert first[:5] == ("a.mp4", "x", 1.0, None, "a.parquet:1")
    assert first.extras == {
        "source_score": 1.5,
        "source_n": 1,
        "source_when": "1970-01-01 00:00:00.000000000",
        "source_label": "l",
    }
    assert second[:5] == (None, None, None, None, "a.parquet:2")


def test_parquet_list_captions_and_unknown_columns(table):
    data = pa.table({"path": ["a"], "caps": [["x", "y"]]})
    (row,) = read(table("a.parquet", data))
    assert (row.caption, row.extras) == ("x", {"source_caps": '["x", "y"]'})
    message = failure(table("a.parquet", data, columns={"uri": "pth"}))
    assert "has no column 'pth', which `columns.uri` names. Did you mean 'path'?" in message


def test_several_parquet_files_are_one_table(table, tmp_path):
    whole = pa.table({"path": [f"{i}" for i in range(3000)], "n": range(3000)})
    table("shards/0.parquet", whole)
    table("shards/1.parquet", pa.table({"path": ["x", "y"], "n": [7.0, None]}))
    settings = SourceSettings(kind="parquet", path=f"{tmp_path}/shards/*.parquet")
    got = rows(settings)
    assert [row.origin for row in (got[0], got[2999], got[3000])] == [
        "0.parquet:1",
        "0.parquet:3000",
        "1.parquet:1",
    ]
    assert [row.extras["source_n"] for row in got[2998:]] == [2998, 2999, 7, None]
    assert resolve_root(settings) == str(tmp_path / "shards")
    table("shards/2.parquet", pa.table({"path": ["x"]}))
    message = failure(settings)
    assert "have different columns: only one of the two has 'n'" in message
    assert "2.parquet" in message


def test_a_damaged_parquet_file(table, tmp_path):
    settings = table("a.parquet", b"PAR1 no more than that")
    assert f"{tmp_path}/a.parquet is not a whole Parquet file" in failure(settings)
