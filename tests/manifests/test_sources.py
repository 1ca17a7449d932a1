import csv
import gzip
import io
import json
import os
import tracemalloc
import zipfile
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from manifests.sources import (
    SourceError,
    SourceRow,
    SourceSettings,
    extras_schema,
    read,
    resolve_root,
    signature,
)

KINDS = {"csv": "csv", "tsv": "csv", "jsonl": "jsonl", "json": "jsonl", "parquet": "parquet"}


@pytest.fixture
def table(tmp_path):
    """Writes a file and returns the settings that read it."""

    def make(name: str, content, **settings) -> SourceSettings:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, pa.Table):
            pq.write_table(content, path)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(content, encoding="utf-8", newline="")
        kind = settings.pop("kind", None) or KINDS[name.split(".")[1]]
        return SourceSettings(kind=kind, path=str(path), **settings)

    return make


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


# ---- published tables ------------------------------------------------------------------------


def test_the_published_openvid_header_is_read(shared_data):
    settings = SourceSettings(kind="openvid", path=str(shared_data / "tables/openvid1m.header.csv"))
    assert rows(settings) == []
    assert list(schema(settings)) == [
        "source_aesthetic_score",
        "source_motion_score",
        "source_temporal_consistency_score",
        "source_camera_motion",
        "source_frame",
        "source_fps",
        "source_seconds",
    ]


def test_the_published_open_sora_header_is_read(shared_data):
    settings = SourceSettings(kind="csv", path=str(shared_data / "tables/open_sora_v2.header.csv"))
    assert rows(settings) == []
    assert "source_num_frames" in schema(settings)
    assert "source_text" not in schema(settings)


def test_cogvideox_factory_csv_and_prompts_say_the_same(shared_data):
    folder = shared_data / "tables"
    caption = "A hiker standing at the top of a mountain, triumphantly, high quality"
    listed = SourceSettings(kind="csv", path=str(folder / "cogvideox_factory_metadata.csv"))
    assert pairs(listed) == [("videos/hiker.mp4", f'"{caption}"')]
    lines = SourceSettings(
        kind="prompts",
        path=str(folder / "cogvideox_factory_prompts.txt"),
        videos="cogvideox_factory_videos.txt",
    )
    assert rows(lines) == [
        SourceRow("videos/hiker.mp4", caption, None, None, "cogvideox_factory_prompts.txt:1", {})
    ]
    assert resolve_root(lines) == str(folder)


def test_easyanimate_scores_are_kept_and_lists_are_left_out(shared_data):
    folder = shared_data / "tables"
    motion = SourceSettings(kind="jsonl", path=str(folder / "easyanimate_motion_score.jsonl"))
    assert schema(motion) == {"source_motion_score": "double"}
    assert [row.extras["source_motion_score"] for row in read(motion)] == [
        4.65617,
        5.28975,
        5.44268,
        4.99615,
        5.59821,
    ]
    nested = SourceSettings(kind="jsonl", path=str(folder / "easyanimate_aesthetic_score.jsonl"))
    assert schema(nested) == {}
    assert rows(nested)[0].uri == "--C66yU3LjM_2-Scene-003.mp4"
    captions = SourceSettings(
        kind="jsonl",
        path=str(folder / "easyanimate_frame_caption.jsonl"),
        columns={"caption": "sampled_frame_caption"},
    )
    first = rows(captions)[0]
    assert first.caption.startswith(" The image captures a moment")
    assert json.loads(first.extras["source_sampled_frame_caption"]) == [first.caption]


@pytest.mark.parametrize(
    ("header", "cells"),
    [("path,text", "a.mp4,A cat"), ("fps,video,caption,aesthetic score", "24.0,a.mp4,A cat,4.5")],
)
def test_both_openvid_headers(table, header, cells):
    settings = table("OpenVid-1M.csv", f"{header}\n{cells}\n", kind="openvid")
    (row,) = read(settings)
    assert row[:5] == ("a.mp4", "A cat", None, None, "OpenVid-1M.csv:2")
    if "aesthetic" in header:
        assert row.extras == {"source_fps": 24.0, "source_aesthetic_score": 4.5}


def test_openvid_without_captions_is_an_error(table):
    settings = table("a.csv", "video,label\na.mp4,x\n", kind="openvid")
    assert "no column is known to hold a caption (caption, text)" in failure(settings)


def test_internvid_through_columns(table):
    line = {
        "YoutubeID": "-abc",
        "Start_timestamp": "00:00:01.200",
        "End_timestamp": "01:00:03.5",
        "Caption": "a dog",
        "Aesthetic_Score": 4.5,
        "UMT_Score": 0.4,
    }
    name = "v/{YoutubeID}_{Start_timestamp}_{End_timestamp}.mp4"
    settings = table("i.jsonl", json.dumps(line), columns={"uri": name})
    (row,) = read(settings)
    assert row.uri == "v/-abc_00:00:01.200_01:00:03.5.mp4"  # already cut: no start, no end
    assert (row.caption, row.start, row.end) == ("a dog", None, None)
    assert row.extras["source_start_timestamp"] == "00:00:01.200"
    times = {"uri": "YoutubeID", "start": "Start_timestamp", "end": "End_timestamp"}
    (row,) = read(table("i.jsonl", json.dumps(line), columns=times))
    assert (row.uri, row.start, row.end) == ("-abc", 1.2, 3603.5)
    assert sorted(row.extras) == ["source_aesthetic_score", "source_umt_score"]


def test_miradata_file_path_comes_before_its_url(table):
    head = "clip_id,video_id,video_url,fps,file_path,short_caption"
    settings = table("m.csv", f"{head}\n7,x,https://h/x,30.0,a/7.mp4,short\n")
    assert pairs(settings) == [("a/7.mp4", None)]
    named = settings.model_copy(
        update={"columns": settings.columns.model_copy(update={"caption": "short_caption"})}
    )
    assert pairs(named) == [("a/7.mp4", "short")]


def test_caps_give_the_first_and_keep_all(table):
    lines = [
        {"path": "a.mp4", "duration": 2.5, "num_frames": 60, "caps": ["one", "two"]},
        {"path": "b.mp4", "duration": 3, "num_frames": 61, "caps": []},
        {"path": "c.mp4", "duration": None, "num_frames": 62, "caps": "plain"},
    ]
    settings = table("b.jsonl", "\n".join(map(json.dumps, lines)))
    assert schema(settings) == {
        "source_duration": "double",
        "source_num_frames": "int64",
        "source_caps": "string",
    }
    got = rows(settings)
    assert [row.caption for row in got] == ["one", None, "plain"]
    assert [row.extras["source_caps"] for row in got] == ['["one", "two"]', "[]", "plain"]
    assert got[1].extras["source_duration"] == 3.0


@pytest.mark.parametrize("indent", [None, 2])
def test_open_sora_plan_lists_are_read_item_by_item(table, indent):
    # Longer than one piece, so that items are cut by its end wherever it falls.
    items = [
        {"path": f"v/{i}.mp4", "cap": ['a "{[', f"ü{i}\n"], "resolution": {"height": i}, "aes": 4.5}
        for i in range(3000)
    ]
    text = json.dumps(items, indent=indent, ensure_ascii=False)
    settings = table("plan.json", text)
    got = rows(settings)
    assert [row.uri for row in got] == [f"v/{i}.mp4" for i in range(3000)]
    assert json.loads(got[2999].extras["source_cap"]) == ['a "{[', "ü2999\n"]
    assert schema(settings) == {"source_aes": "double", "source_cap": "string"}
    last = 1 if indent is None else text[: text.index("v/2999.mp4")].count("\n")
    assert got[2999].origin == f"plan.json:{last}"


# ---- CSV -------------------------------------------------------------------------------------


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
        ("path;text\na.mp4;x\n", "set `delimiter: ';'`"),
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
    assert r"set `delimiter: '\t'`" in failure(table("a.csv", "path\ttext\na.mp4\tx\n"))


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


# ---- JSON ------------------------------------------------------------------------------------


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


# ---- round trips -----------------------------------------------------------------------------

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


@given(PAIRS, st.booleans(), st.booleans())
def test_any_json_comes_back_as_it_was_written(clips, ascii_only, one_list):
    items = [{"uri": uri, "caption": caption} for uri, caption in clips]
    dumps = json.JSONEncoder(ensure_ascii=ascii_only).encode
    text = dumps(items) if one_list else "\n".join(map(dumps, items))
    settings = SourceSettings(kind="jsonl", path=in_memory("p.jsonl", text.encode()))
    assert pairs(settings) == [(as_read(uri), caption) for uri, caption in clips]


# ---- Parquet ---------------------------------------------------------------------------------


def test_parquet_reads_only_what_it_keeps(table):
    settings = table(
        "a.parquet",
        pa.table(
            {
                "video": ["a.mp4", None],
                "caption": ["x", None],
                "start": [1, None],
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


# ---- prompts.txt and videos.txt --------------------------------------------------------------


@pytest.fixture
def prompts(tmp_path):
    def make(prompts: str, videos: str) -> SourceSettings:
        (tmp_path / "prompts.txt").write_text(prompts, encoding="utf-8")
        (tmp_path / "videos.txt").write_text(videos, encoding="utf-8")
        return SourceSettings(kind="prompts", path=str(tmp_path / "prompts.txt"))

    return make


def test_prompts_pair_line_by_line(prompts):
    settings = prompts('one, "1"\r\n二 \n', "a b.mp4\nb.mp4\n\n\n")
    assert rows(settings) == [
        SourceRow("a b.mp4", 'one, "1"', None, None, "prompts.txt:1", {}),
        SourceRow("b.mp4", "二", None, None, "prompts.txt:2", {}),
    ]
    assert extras_schema(settings).names == []


def test_no_pair_is_given_when_the_counts_differ(prompts):
    settings = prompts("1\n2\n3\n4\n5", "a\nb\nc\nd\n")
    with pytest.raises(SourceError) as caught:
        next(read(settings))
    message = str(caught.value)
    assert "prompts.txt has 5 lines and" in message
    assert "videos.txt has 4" in message
    assert "videos.txt ends after line 4, prompts.txt:5 has no partner" in message


def test_a_blank_line_is_named_before_any_pair(prompts, tmp_path):
    settings = prompts("1\n2\n3\n", "a\n\n\nb\nc\n")
    with pytest.raises(SourceError, match="the line is blank") as caught:
        next(read(settings))
    assert f"{tmp_path}/videos.txt:2: " in str(caught.value)


def test_prompts_that_are_empty_missing_or_no_text(prompts, tmp_path):
    assert f"{tmp_path}/prompts.txt is empty" in failure(prompts("", "a\n"))
    settings = prompts("x\n", "a\n")
    (tmp_path / "prompts.txt").write_bytes(b"x\n\xff\n")
    assert "prompts.txt:2:1: byte 0xff" in failure(settings)
    (tmp_path / "videos.txt").unlink()
    assert f"there is no file {tmp_path}/videos.txt" in failure(settings)


# ---- folders ---------------------------------------------------------------------------------


def fill(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def test_a_folder_is_read_in_the_order_of_its_paths(tmp_path):
    fill(tmp_path, "b.MP4", "a/z.webm", "a.mkv", "a b/'q\" 猫.mov", "x.txt", "p.png", "a.1.mp4")
    fill(tmp_path, ".hidden.mp4", ".git/a.mp4", "sub.mp4/in.ts")
    (tmp_path / "b.txt").write_bytes(b"\xef\xbb\xbfA cat,\r\n asleep\r\n")
    (tmp_path / "a.1.txt").write_text("")
    (tmp_path / "a/z.txt").mkdir()
    settings = SourceSettings(kind="folder", path=f"{tmp_path}/")
    got = [(row.uri, row.caption) for row in read(settings)]
    assert got == [
        ("a b/'q\" 猫.mov", None),
        ("a.1.mp4", ""),
        ("a.mkv", None),
        ("a/z.webm", None),
        ("b.MP4", "A cat,\r\n asleep"),
        ("sub.mp4/in.ts", None),
    ]
    assert [uri for uri, _ in got] == sorted(uri for uri, _ in got)
    assert resolve_root(settings) == str(tmp_path)
    assert extras_schema(settings).names == []
    flat = SourceSettings(kind="folder", path=str(tmp_path), recursive=False)
    assert [row.uri for row in read(flat)] == ["a.1.mp4", "a.mkv", "b.MP4"]
    chosen = SourceSettings(kind="folder", path=str(tmp_path), patterns=("A/*", "*.mkv"))
    assert [row.uri for row in read(chosen)] == ["a.mkv", "a/z.webm"]


def test_the_real_videos_are_found(shared_data):
    folder = shared_data / "videos"
    names = [row.uri for row in read(SourceSettings(kind="folder", path=str(folder)))]
    assert names == sorted(path.name for path in folder.iterdir())


def test_links_are_followed_but_not_round_and_round(tmp_path):
    fill(tmp_path, "in/a.mp4", "out/b.mp4")
    (tmp_path / "in/loop").symlink_to(tmp_path / "in")
    (tmp_path / "in/other").symlink_to(tmp_path / "out")
    (tmp_path / "in/link.mp4").symlink_to(tmp_path / "out/b.mp4")
    (tmp_path / "in/gone.mp4").symlink_to(tmp_path / "nowhere.mp4")
    (tmp_path / "out/back").symlink_to(tmp_path / "in")
    settings = SourceSettings(kind="folder", path=str(tmp_path / "in"))
    assert [row.uri for row in read(settings)] == ["a.mp4", "gone.mp4", "link.mp4", "other/b.mp4"]


def test_a_folder_that_is_none_or_has_no_videos(tmp_path):
    missing = SourceSettings(kind="folder", path=str(tmp_path / "no"))
    assert f"there is no folder {tmp_path}/no: check `path`" in failure(missing)
    fill(tmp_path, "clips.csv")
    file = SourceSettings(kind="folder", path=str(tmp_path / "clips.csv"))
    assert f"{tmp_path}/clips.csv is a file" in failure(file)
    empty = SourceSettings(kind="folder", path=str(tmp_path))
    assert f"{tmp_path} has no videos (.3gp, .avi" in failure(empty)


def test_captions_and_names_that_are_no_text(tmp_path):
    fill(tmp_path, "a.mp4")
    (tmp_path / "a.txt").write_bytes(b"fine\nn\xe9\n")
    settings = SourceSettings(kind="folder", path=str(tmp_path))
    assert f"{tmp_path}/a.txt:2:2: byte 0xe9" in failure(settings)
    latin = SourceSettings(kind="folder", path=str(tmp_path), encoding="latin-1")
    assert pairs(latin) == [("a.mp4", "fine\nné")]
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe9.mp4")).write_bytes(b"x")
    assert "is not UTF-8. Rename it" in failure(latin)


# ---- where files lie -------------------------------------------------------------------------


def test_every_kind_reads_from_any_file_system():
    fs = fsspec.filesystem("memory")
    fs.pipe(
        {
            "/any/v/a.mp4": b"x",
            "/any/v/sub/b.mp4": b"x",
            "/any/v/sub/b.txt": b"caption\n",
            "/any/t/a.csv": b"path\na.mp4\n",
            "/any/t/a.jsonl": b'{"path": "a.mp4"}',
            "/any/t/prompts.txt": b"p\n",
            "/any/t/videos.txt": b"a.mp4\n",
        }
    )
    with fs.open("/any/t/a.parquet", "wb") as file:
        pq.write_table(pa.table({"path": ["a.mp4"]}), file)
    for kind, name in [("csv", "a.csv"), ("jsonl", "a.jsonl"), ("parquet", "*.parquet")]:
        settings = SourceSettings(kind=kind, path=f"memory://any/t/{name}")
        assert [row.uri for row in read(settings)] == ["a.mp4"]
        assert resolve_root(settings) == "memory:///any/t"
    settings = SourceSettings(kind="prompts", path="memory://any/t/prompts.txt")
    assert pairs(settings) == [("a.mp4", "p")]
    folder = SourceSettings(kind="folder", path="memory://any/v")
    assert pairs(folder) == [("a.mp4", None), ("sub/b.mp4", "caption")]
    assert resolve_root(folder) == "memory:///any/v"
    before = signature(folder)
    fs.pipe_file("/any/v/c.mp4", b"x")
    assert signature(folder) != before


def test_compressed_tables(table):
    text = b"path\ttext\na.mp4\tx\n"
    assert pairs(table("a.tsv.gz", gzip.compress(text))) == [("a.mp4", "x")]
    zst = pa.compress(text, codec="zstd", asbytes=True)
    assert pairs(table("a.tsv.zst", zst)) == [("a.mp4", "x")]
    for broken in (table("a.csv.gz", gzip.compress(text)[:-9]), table("a.csv.zst", zst[:-4])):
        assert "can't be read" in failure(broken)


def test_files_that_are_not_there(table, tmp_path):
    settings = SourceSettings(kind="csv", path=str(tmp_path / "no.csv"))
    assert f"there is no file {tmp_path}/no.csv" in failure(settings)
    with pytest.raises(SourceError, match="there is no file"):
        signature(settings)
    glob = SourceSettings(kind="csv", path=str(tmp_path / "*.csv"))
    assert f"no file matches {tmp_path}/*.csv" in failure(glob)
    folder = SourceSettings(kind="csv", path=str(tmp_path))
    assert f"{tmp_path} is a folder, where a file must be" in failure(folder)
    assert "can't be opened" in failure(SourceSettings(kind="csv", path="nope://a.csv"))
    assert pairs(table("odd[1].csv", "path\na\n")) == [("a", None)]


def test_globs_of_text_tables_count_lines_per_file(table, tmp_path):
    table("a/1.csv", "path,n\na,1\n")
    table("b/2.csv", "n,path\n2,b\n")
    fill(tmp_path, "b/.3.csv")
    settings = SourceSettings(kind="csv", path=f"{tmp_path}/*/*.csv")
    got = [(row.uri, row.origin, row.extras["source_n"]) for row in read(settings)]
    assert got == [("a", "a/1.csv:2", 1), ("b", "b/2.csv:2", 2)]
    assert resolve_root(settings) == str(tmp_path)


def test_tables_inside_of_archives_and_caches(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("t/a.csv", "path\na.mp4\n")
        archive.writestr("t/prompts.txt", "p\n")
        archive.writestr("t/videos.txt", "b.mp4\n")
        archive.writestr("v/c.mp4", "x")
    inside = f"::file://{tmp_path}/x.zip"
    assert pairs(SourceSettings(kind="csv", path=f"zip://t/a.csv{inside}")) == [("a.mp4", None)]
    lines = SourceSettings(kind="prompts", path=f"zip://t/prompts.txt{inside}")
    assert pairs(lines) == [("b.mp4", "p")]
    folder = SourceSettings(kind="folder", path=f"zip://v{inside}")
    assert pairs(folder) == [("c.mp4", None)]
    assert resolve_root(folder) == f"zip://v{inside}"
    url = in_memory("cached.csv", b"path\na.mp4\n")
    assert pairs(SourceSettings(kind="csv", path=f"simplecache::{url}")) == [("a.mp4", None)]


def test_several_files_of_prompts_are_refused(tmp_path):
    fill(tmp_path, "a.txt", "b.txt")
    settings = SourceSettings(kind="prompts", path=f"{tmp_path}/*.txt")
    assert "are 2 files: name one" in failure(settings)


@pytest.mark.parametrize(
    ("path", "root"),
    [
        ("zip://t/a.csv::memory://x.zip", "zip://t::memory://x.zip"),
        ("simplecache::memory://t/a.csv", "simplecache::memory://t"),
    ],
)
def test_the_root_inside_of_a_chain(path, root):
    assert resolve_root(SourceSettings(kind="csv", path=path)) == root


def test_a_given_root_is_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = SourceSettings(kind="csv", path="a.csv", root="videos")
    assert resolve_root(settings) == str(tmp_path / "videos")
    assert resolve_root(SourceSettings(kind="csv", path="t/a.csv")) == str(tmp_path / "t")


# ---- signatures ------------------------------------------------------------------------------


def test_a_signature_changes_with_the_file_and_the_settings_only(table):
    settings = table("a.csv", "path\na\n")
    before = signature(settings)
    assert signature(settings) == before
    assert signature(settings.model_copy(update={"keep": ["path"]})) != before
    os.link(settings.path, settings.path + ".link")
    assert signature(settings) == before
    os.utime(settings.path, ns=(1, 1))
    touched = signature(settings)
    assert touched != before
    Path(settings.path).write_text("path\nab\n")
    os.utime(settings.path, ns=(1, 1))
    assert signature(settings) != touched


def test_the_signature_of_a_folder_sees_videos_and_captions_and_nothing_else(tmp_path):
    fill(tmp_path, "a/1.mp4", "a/1.txt", "note.md", "other.txt")
    settings = SourceSettings(kind="folder", path=str(tmp_path))
    seen = [signature(settings)]
    fill(tmp_path, "note2.md", "other2.txt")
    assert signature(settings) == seen[0]
    for change in (
        lambda: (tmp_path / "a/1.txt").write_text("new"),
        lambda: (tmp_path / "a/1.mp4").write_text("new"),
        lambda: fill(tmp_path, "a/2.mp4"),
        lambda: (tmp_path / "a/1.txt").unlink(),
        lambda: (tmp_path / "a/2.mp4").rename(tmp_path / "a/3.mp4"),
    ):
        change()
        seen.append(signature(settings))
    assert len(set(seen)) == 6


def test_the_signature_of_prompts_sees_both_files(prompts, tmp_path):
    settings = prompts("1\n", "a\n")
    before = signature(settings)
    (tmp_path / "videos.txt").write_text("abc\n")
    assert signature(settings) != before


# ---- settings --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "folder", "columns": {"uri": "x"}}, "`columns` means nothing to kind folder"),
        ({"kind": "parquet", "encoding": "utf-8"}, "`encoding` means nothing to kind parquet"),
        ({"kind": "csv", "videos": "v.txt"}, "it is for prompts"),
        ({"kind": "csv", "encoding": "klingon"}, "unknown encoding: klingon"),
        ({"kind": "csv", "encoding": "hex"}, "is not a text encoding"),
        ({"kind": "csv", "delimiter": "::"}, "one character"),
        ({"kind": "csv", "keep": {"a": "date"}}, "'str', 'int', 'float' or 'bool'"),
        ({"kind": "csv", "colums": {}}, "Extra inputs are not permitted"),
        ({"kind": "csv", "columns": {"url": "x"}}, "Extra inputs are not permitted"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings, message):
    with pytest.raises(ValidationError) as caught:
        SourceSettings(path="x", **settings)
    assert message in str(caught.value)


def test_a_column_can_be_switched_off(table):
    text = "path,text,start\na.mp4,x,7\n"
    (row,) = read(table("a.csv", text))
    assert (row.caption, row.start, row.extras) == ("x", 7.0, {})
    (row,) = read(table("a.csv", text, columns={"start": "", "caption": ""}))
    assert (row.caption, row.start) == (None, None)
    assert row.extras == {"source_text": "x", "source_start": 7}


def test_a_pattern_without_its_values_names_no_video(table):
    text = "id,n\nx,1\n,2\n"
    settings = table("a.csv", text, columns={"uri": "v/{id}-{n}.mp4"})
    assert [row.uri for row in read(settings)] == ["v/x-1.mp4", None]
    missing = table("a.csv", text, columns={"uri": "v/{idd}.mp4"})
    assert "has no column 'idd', which `columns.uri` names. Did you mean 'id'?" in failure(missing)
