import gzip
import os
import tempfile
import zipfile
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

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


def failure(settings: SourceSettings) -> str:
    with pytest.raises(SourceError) as caught:
        rows(settings)
    return str(caught.value)


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
    fill(tmp_path, "a.mp4", "b.mp4")
    (tmp_path / "a.txt").write_bytes(b"fine\nn\xe9\n")
    settings = SourceSettings(kind="folder", path=str(tmp_path))
    bad, good = read(settings)
    assert (bad.uri, good.uri, good.flaw) == ("a.mp4", "b.mp4", None), "it costs its own row"
    assert f"{tmp_path}/a.txt:2:2: byte 0xe9" in (bad.flaw or "")
    (tmp_path / "b.mp4").unlink()
    latin = SourceSettings(kind="folder", path=str(tmp_path), encoding="latin-1")
    assert pairs(latin) == [("a.mp4", "fine\nné")]
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xe9.mp4")).write_bytes(b"x")
    (flaw,) = [row.flaw for row in read(latin) if row.uri != "a.mp4"]
    assert flaw == r"the file name \udce9.mp4 is not UTF-8: rename it"


def in_memory(name: str, data: bytes) -> str:
    fsspec.filesystem("memory").pipe_file(f"/sources/{name}", data)
    return f"memory://sources/{name}"


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
    for name, data in [
        ("a.csv.gz", gzip.compress(text)[:-9]),
        ("a.csv.zst", zst[:-4]),
        ("a.csv.xz", text),
        ("a.csv.zip", text),
    ]:
        assert f"{name} can't be read" in failure(table(name, data))


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


def test_tables_inside_of_archives_and_caches(tmp_path, monkeypatch):
    # fsspec's caches stay until this process ends.
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
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
