from __future__ import annotations

import zipfile
from pathlib import Path

import pyarrow as pa
import pytest

from manifests import local_files
from manifests.store import Store


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("a.mp4", "/root/a.mp4"),
        ("../a.mp4", "/root/../a.mp4"),
        ("/data/a.mp4", "/data/a.mp4"),
        ("file:///data/a%20b.mp4", "/data/a b.mp4"),
        ("file://localhost/data/a.mp4", "/data/a.mp4"),
        ("zip://in/a.mp4::b.zip", "/root/b.zip"),
        ("zip://in/a.mp4::https://h/b.zip", None),
        ("https://h/a.mp4", None),
        ("s3://b/a.mp4", None),
    ],
)
def test_which_local_file_a_row_names(uri: str, path: str | None) -> None:
    assert local_files.local_file(uri, "/root") == path
    assert local_files.local_file(uri, "s3://bucket") is None


def test_a_version_is_that_of_the_file_or_of_its_archive(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"abc")
    with zipfile.ZipFile(tmp_path / "b.ZIP", "w") as file:
        file.writestr("in.mp4", b"x")
    state = (tmp_path / "a.mp4").stat()
    assert local_files.version_of(str(tmp_path / "a.mp4")) == f"3-{state.st_mtime_ns}"
    archive = local_files.version_of(str(tmp_path / "b.ZIP"))
    assert archive is not None
    assert local_files.version_of(str(tmp_path / "b.ZIP" / "in.mp4")) == archive
    for gone in ("gone", "a.mp4/in", "a\0b", "x" * 300):
        assert local_files.version_of(f"{tmp_path}/{gone}") is None


@pytest.mark.parametrize("slow", [0.0, 1e9])
def test_slow_disks_are_asked_side_by_side_with_the_same_answer(
    tmp_path: Path, slow: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local_files, "SLOW", slow)
    for i in range(300):
        (tmp_path / f"{i}").write_bytes(b"x" * i)
    paths = [f"{tmp_path}/{i}" for i in range(310)]
    found = local_files.versions(paths)
    assert [v and int(v.partition("-")[0]) for v in found] == [*range(300), *[None] * 10]
    assert local_files.versions([]) == []


def test_what_counts_as_replaced(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "work"))
    file, later = tmp_path / "a.mp4", tmp_path / "later.mp4"
    uris = pa.array(["a.mp4", "later.mp4", "https://h/b.mp4", None, "a.mp4"])

    def scanned(most: int = 9) -> list[str | None]:
        files = local_files.Files(store, str(tmp_path), most)
        found = files.versions(uris).to_pylist()
        files.save(store)
        return found

    file.write_bytes(b"abc")
    assert not local_files.replaced(store), "nothing was listed yet"
    state = local_files.version_of(str(file))
    assert scanned() == [state, None, None, None, state]
    assert not local_files.replaced(store)
    file.rename(tmp_path / "away")
    assert not local_files.replaced(store), "gone is not replaced"
    assert scanned() == [state, None, None, None, state], "also where the table is read anew"
    (tmp_path / "away").rename(file)
    assert not local_files.replaced(store)
    later.write_bytes(b"new")
    assert local_files.replaced(store)
    later.unlink()
    file.write_bytes(b"abcd")
    assert local_files.replaced(store)
    assert scanned(most=1)[0] == local_files.version_of(str(file))
    assert not store.find(local_files.FILES), "too many to look at"
    assert not local_files.replaced(store)
