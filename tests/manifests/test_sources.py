import json
import os
from pathlib import Path

import pytest
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


def fill(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


@pytest.fixture
def prompts(tmp_path):
    def make(prompts: str, videos: str) -> SourceSettings:
        (tmp_path / "prompts.txt").write_text(prompts, encoding="utf-8")
        (tmp_path / "videos.txt").write_text(videos, encoding="utf-8")
        return SourceSettings(kind="prompts", path=str(tmp_path / "prompts.txt"))

    return make


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
