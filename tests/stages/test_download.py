from __future__ import annotations

import hashlib
import io
import os
import pickle
import threading
import zipfile
from pathlib import Path

import fsspec
import pytest
from web import Request, Web

from stages.base import Context, Failed, StageError
from stages.download import Download, DownloadSettings, Place, locate, suffix_of

DATA = bytes(range(256)) * 8192  # 2 MiB


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


@pytest.fixture
def folders(tmp_path: Path) -> Context:
    (tmp_path / "root").mkdir()
    (tmp_path / "work").mkdir()
    return Context(workdir=str(tmp_path / "work"), root=str(tmp_path / "root"))


def download(context: Context, *uris: str, **settings: object) -> list[object]:
    stage = Download(DownloadSettings(**{"backoff": 0.0, **settings}), context)
    stage = pickle.loads(pickle.dumps(stage))
    return list(stage.process([{"clip_id": str(i), "uri": u} for i, u in enumerate(uris)]))


def failure(outcome: object) -> str:
    assert isinstance(outcome, Failed), outcome
    return outcome.error


def media(context: Context, outcome: object) -> bytes:
    assert isinstance(outcome, dict), outcome
    assert not Path(outcome["path"]).is_absolute()
    data = Path(context.workdir, outcome["path"]).read_bytes()
    assert (outcome["content"], outcome["bytes"]) == (sha(data), len(data))
    return data


# ---------------------------------------------------------------------------- local files


@pytest.mark.parametrize(
    "name",
    [
        "a.mp4",
        "two words.mp4",
        'it\'s "q".mp4',
        "夜の街.mp4",
        "a.b.c.mkv",
        "100%20.mp4",
        "a#b?c.mp4",
    ],
)
def test_a_local_file_is_hashed_where_it_lies(folders: Context, name: str) -> None:
    file = Path(folders.root, name)
    file.write_bytes(name.encode())
    expected = {
        "path": str(file),
        "content": sha(name.encode()),
        "bytes": len(name.encode()),
        "state": f"{len(name.encode())}-{file.stat().st_mtime_ns}",
    }
    assert download(folders, name, str(file), f"file://{file}", f"./{name}") == [expected] * 4
    assert not Path(folders.workdir, "media").exists()


def test_a_file_url_may_be_percent_encoded(folders: Context) -> None:
    Path(folders.root, "two words.mp4").write_bytes(b"x")
    (outcome,) = download(folders, f"file://{folders.root}/two%20words.mp4")
    assert outcome["path"].endswith("/two words.mp4")


def test_faults_of_local_files_have_their_class(folders: Context) -> None:
    root = Path(folders.root)
    (root / "folder").mkdir()
    (root / "empty.mp4").touch()
    (root / "broken.mp4").symlink_to(root / "nowhere")
    (root / "file").write_bytes(b"x")
    os.mkfifo(root / "pipe")
    uris = ["gone.mp4", "empty.mp4", "folder", "broken.mp4", "file/a.mp4", "pipe", "n\0l.mp4", ""]
    classes = [failure(o) for o in download(folders, *uris)]
    assert classes == [
        "missing_file",
        "empty_file",
        "not_a_file",
        "missing_file",
        "missing_file",
        "not_a_file",
        "missing_file",
        "not_a_file",
    ]
    assert failure(download(folders, "x" * 300)[0]) == "unreadable"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(folders: Context) -> None:
    file = Path(folders.root, "a.mp4")
    file.write_bytes(b"x")
    file.chmod(0)
    assert failure(download(folders, "a.mp4")[0]) == "permission"


def test_relative_paths_stay_in_the_root_unless_allowed(folders: Context) -> None:
    Path(folders.root, "..", "secret.mp4").write_bytes(b"x")
    Path(folders.root, "a").mkdir()
    Path(folders.root, "in.mp4").write_bytes(b"in")
    for uri in ("../secret.mp4", "a/../../secret.mp4", "file://../secret.mp4"):
        (outcome,) = download(folders, uri)
        assert failure(outcome) == "outside_root"
        (outcome,) = download(folders, uri, allow_outside=True)
        assert outcome["content"] == sha(b"x")
    assert download(folders, "a/../in.mp4")[0]["content"] == sha(b"in")


def test_schemes_are_a_list_of_what_is_allowed(folders: Context) -> None:
    assert failure(download(folders, "ftp://host/a.mp4")[0]) == "bad_scheme"
    assert failure(download(folders, "gopher://host/a.mp4")[0]) == "bad_scheme"
    Path(folders.root, "a.mp4").write_bytes(b"x")
    assert failure(download(folders, "a.mp4", schemes=["https"])[0]) == "bad_scheme"


def test_a_remote_table_names_no_local_files(tmp_path: Path) -> None:
    context = Context(workdir=str(tmp_path), root="memory://bucket")
    (tmp_path / "a.mp4").write_bytes(b"x")
    assert failure(download(context, str(tmp_path / "a.mp4"))[0]) == "outside_root"
    assert failure(download(context, f"file://{tmp_path}/a.mp4")[0]) == "outside_root"
    assert locate("a/b.mp4", "s3://bucket/t/", DownloadSettings()) == Place("s3://bucket/t/a/b.mp4")


# ---------------------------------------------------------------------------- zip files


@pytest.fixture
def archive(folders: Context) -> Path:
    path = Path(folders.root, "videos.zip")
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("inner/a b.MP4", DATA)
        file.writestr("../../escape.sh", b"evil")
        file.writestr("empty.mp4", b"")
        file.mkdir("folder")
    return path


def test_members_come_out_by_either_form(folders: Context, archive: Path) -> None:
    uris = [
        "videos.zip/inner/a b.MP4",
        "zip://inner/a b.MP4::videos.zip",
        f"{archive}/inner/a b.MP4",
    ]
    outcomes = download(folders, *uris)
    assert [media(folders, o) for o in outcomes] == [DATA] * 3
    assert {o["path"] for o in outcomes} == {f"media/{sha(DATA)[:2]}/{sha(DATA)}.mp4"}


def test_a_members_name_is_never_a_path(folders: Context, archive: Path) -> None:
    (outcome,) = download(folders, "zip://../../escape.sh::videos.zip")
    assert media(folders, outcome) == b"evil"
    assert not list(Path(folders.root).parent.rglob("escape*"))


def test_faults_of_archives_have_their_class(folders: Context, archive: Path) -> None:
    data = bytearray(archive.read_bytes())
    with zipfile.ZipFile(archive) as file:
        local, central = data.find(b"PK\3\4"), data.find(b"PK\1\2")
        start = local + 30 + len(file.infolist()[0].filename)
    locked, damaged, text = (Path(folders.root, f"{n}.zip") for n in ("locked", "damaged", "text"))
    locked.write_bytes(bytes(data[: central + 8]) + b"\1" + bytes(data[central + 9 :]))
    data[start + 20 : start + 60] = b"\xff" * 40
    damaged.write_bytes(data)
    text.write_text("no archive")
    uris = {
        "videos.zip/gone.mp4": "missing_file",
        "zip://folder/::videos.zip": "not_a_file",
        "videos.zip/empty.mp4": "empty_file",
        "locked.zip/inner/a b.MP4": "encrypted",
        "damaged.zip/inner/a b.MP4": "bad_archive",
        "text.zip/a.mp4": "bad_archive",
        "zip://a.mp4::gone.zip": "missing_file",
        "zip://a::zip://b::videos.zip": "bad_scheme",
    }
    assert [failure(o) for o in download(folders, *uris)] == list(uris.values())


def test_an_archive_that_unpacks_too_far_is_stopped(folders: Context, archive: Path) -> None:
    (outcome,) = download(folders, "videos.zip/inner/a b.MP4", max_bytes=len(DATA) - 1)
    assert failure(outcome) == "too_large"
    assert not list(Path(folders.workdir, "media").rglob("*.mp4"))


def test_a_folder_may_be_called_zip(folders: Context) -> None:
    file = Path(folders.root, "clips.zip", "a.mp4")
    file.parent.mkdir()
    file.write_bytes(b"x")
    assert download(folders, "clips.zip/a.mp4")[0]["path"] == str(file)


# ---------------------------------------------------------------------------- HTTP


def serve(request: Request, tag: str = '"v1"', data: bytes = DATA) -> None:
    """A sound server of one file that honours ranges."""
    start = int((request.headers.get("Range") or "bytes=0-").removeprefix("bytes=").split("-")[0])
    if start >= len(data):
        request.reply(416)
    elif start:
        span = f"bytes {start}-{len(data) - 1}/{len(data)}"
        request.reply(206, data[start:], ETag=tag, Content_Range=span)
    else:
        request.reply(200, data, ETag=tag)


def test_a_remote_file_is_stored_by_its_content(folders: Context) -> None:
    with Web(serve) as web:
        uri = f"{web.url}/a%20b.mp4?X-Amz-Signature=abc"
        outcomes = download(folders, uri, uri)
        assert [media(folders, o) for o in outcomes] == [DATA, DATA]
        assert outcomes[0]["path"] == f"media/{sha(DATA)[:2]}/{sha(DATA)}.mp4"
        assert web.requests == ["GET /a%20b.mp4?X-Amz-Signature=abc"]
        # Another run, as after a crash before the commit, asks for nothing.
        assert download(folders, uri) == outcomes[:1]
        assert len(web.requests) == 1
        # A file that was deleted is fetched again.
        Path(folders.workdir, outcomes[0]["path"]).unlink()
        assert media(folders, download(folders, uri)[0]) == DATA
        assert len(web.requests) == 2
    assert not list(Path(folders.workdir, "media/.part").iterdir())


def test_results_stand_in_the_order_of_the_rows(folders: Context) -> None:
    with Web(lambda request: request.reply(200, request.path.encode() * 99)) as web:
        uris = [f"{web.url}/{i}.mp4" for i in range(40)]
        outcomes = download(folders, *uris, connections=7)
        assert [media(folders, o) for o in outcomes] == [
            f"/{i}.mp4".encode() * 99 for i in range(40)
        ]
        assert download(folders, *uris, connections=1) == outcomes


def test_a_cut_connection_is_resumed_where_it_broke(folders: Context) -> None:
    half = len(DATA) // 2

    def answer(request: Request) -> None:
        if request.headers.get("Range") is None:
            request.cut(200, DATA[:half], len(DATA), ETag='"v1"')
        else:
            serve(request)

    with Web(answer) as web:
        (outcome,) = download(folders, f"{web.url}/a.mp4")
        assert media(folders, outcome) == DATA
        assert len(web.ranges) == 2
        # All that came before the cut was kept: no byte was served twice.
        assert web.ranges[1] == f"bytes={half}-"


def test_a_part_is_resumed_by_the_next_run(folders: Context) -> None:
    broken = True

    def answer(request: Request) -> None:
        if broken:
            request.cut(200, DATA[:500_000], len(DATA), ETag='"v1"')
        else:
            serve(request)

    with Web(answer) as web:
        assert failure(download(folders, f"{web.url}/a.mp4", retries=0)[0]) == "network"
        broken = False
        assert media(folders, download(folders, f"{web.url}/a.mp4")[0]) == DATA
        assert web.ranges == [None, "bytes=500000-"]


@pytest.mark.parametrize("fault", ["changed", "no ranges", "no tag", "shorter"])
def test_a_part_of_another_version_is_thrown_away(folders: Context, fault: str) -> None:
    new = DATA[::-1] if fault != "shorter" else DATA[:1000]
    first = True

    def answer(request: Request) -> None:
        nonlocal first
        if first:
            first = False
            tag = {} if fault == "no tag" else {"ETag": '"v1"'}
            request.cut(200, DATA[:700_000], len(DATA), **tag)
        elif fault == "no ranges":
            request.reply(200, new, ETag='"v2"')
        else:
            serve(request, '"v2"', new)

    with Web(answer) as web:
        assert media(folders, download(folders, f"{web.url}/a.mp4")[0]) == new


def test_a_passing_fault_is_tried_again_and_a_lasting_one_is_not(folders: Context) -> None:
    counts: dict[str, int] = {}

    def answer(request: Request) -> None:
        n = counts[request.path] = counts.get(request.path, 0) + 1
        if request.path == "/flaky.mp4" and n <= 2:
            request.reply(500 if n == 1 else 429, b"busy", Retry_After="0")
        elif request.path in ("/404.mp4", "/403.mp4", "/503.mp4"):
            request.reply(int(request.path[1:4]))
        else:
            request.reply(200, DATA)

    with Web(answer) as web:
        names = ["flaky", "404", "403", "503"]
        outcomes = download(folders, *(f"{web.url}/{n}.mp4" for n in names), retries=2)
    assert media(folders, outcomes[0]) == DATA
    assert [failure(o) for o in outcomes[1:]] == ["http_404", "http_403", "http_503"]
    assert counts == {"/flaky.mp4": 3, "/404.mp4": 1, "/403.mp4": 1, "/503.mp4": 3}


def test_too_large_is_known_from_the_header_or_found_on_the_way(folders: Context) -> None:
    def answer(request: Request) -> None:
        if request.path == "/told.mp4":
            request.cut(200, b"", 10 << 30)
            return
        request.send_response(200)
        request.send_header("Transfer-Encoding", "chunked")
        request.end_headers()
        for _ in range(40):
            request.wfile.write(b"%x\r\n" % 100_000 + b"x" * 100_000 + b"\r\n")
        request.wfile.write(b"0\r\n\r\n")

    with Web(answer) as web:
        outcomes = download(
            folders, f"{web.url}/told.mp4", f"{web.url}/untold.mp4", max_bytes=1_000_000
        )
        assert [failure(o) for o in outcomes] == ["too_large", "too_large"]
        assert web.requests.count("GET /told.mp4") == 1
        (outcome,) = download(folders, f"{web.url}/untold.mp4")
        assert len(media(folders, outcome)) == 4_000_000


def test_silence_is_a_timeout(folders: Context) -> None:
    released = threading.Event()

    def answer(request: Request) -> None:
        released.wait(20)

    with Web(answer) as web:
        (outcome,) = download(folders, f"{web.url}/a.mp4", timeout=0.5, retries=1)
        released.set()
        assert failure(outcome) == "timeout"
        assert len(web.requests) == 2


def test_nobody_there_is_a_network_fault(folders: Context) -> None:
    with Web(serve) as web:
        url = web.url
    outcomes = download(folders, f"{url}/a.mp4", "http://[broken", retries=1)
    assert [failure(o) for o in outcomes] == ["network", "bad_url"]


def test_an_empty_answer_is_an_empty_file(folders: Context) -> None:
    with Web(lambda request: request.reply(200)) as web:
        assert failure(download(folders, f"{web.url}/a.mp4")[0]) == "empty_file"


def test_no_message_bears_a_secret(folders: Context) -> None:
    with Web(lambda request: request.reply(403)) as web:
        host = web.url.removeprefix("http://")
        uris = [
            f"http://user:hunter2@{host}/a.mp4",
            f"{web.url}/b.mp4?X-Amz-Signature=hunter2&part=1&token=hunter2",
            f"zip://a.mp4::http://user:hunter2@{host}/c.zip?sig=hunter2",
        ]
        outcomes = download(folders, *uris)
    assert all("hunter2" not in str(outcome) for outcome in outcomes)
    assert "part=1" in outcomes[1].message


def test_a_member_of_a_remote_archive_is_read_by_ranges(folders: Context) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        file.writestr("a.mp4", DATA)
    packed = buffer.getvalue()

    def answer(request: Request) -> None:
        asked = request.headers.get("Range")
        if asked is None:
            request.reply(200, packed, Accept_Ranges="bytes")
            return
        first, last = asked.removeprefix("bytes=").split("-")
        start, stop = int(first), min(int(last or len(packed)), len(packed) - 1) + 1
        span = f"bytes {start}-{stop - 1}/{len(packed)}"
        request.reply(206, packed[start:stop], Content_Range=span)

    with Web(answer) as web:
        outcomes = download(folders, f"zip://a.mp4::{web.url}/x.zip", f"zip://b::{web.url}/x.zip")
    assert media(folders, outcomes[0]) == DATA
    assert failure(outcomes[1]) == "missing_file"


# ---------------------------------------------------------------------------- other filesystems


def test_any_fsspec_filesystem_will_do(folders: Context) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe_file("/vidpipe-test/a.webm", DATA)
    fs.pipe_file("/vidpipe-test/empty.webm", b"")
    try:
        context = Context(workdir=folders.workdir, root="memory://vidpipe-test")
        uris = ["a.webm", "memory://vidpipe-test/a.webm", "gone.webm", "empty.webm", ""]
        outcomes = download(context, *uris)
    finally:
        fs.rm("/vidpipe-test", recursive=True)
    assert [media(folders, o) for o in outcomes[:2]] == [DATA, DATA]
    assert [failure(o) for o in outcomes[2:]] == ["missing_file", "empty_file", "not_a_file"]


def test_a_missing_driver_is_named(folders: Context) -> None:
    pytest.importorskip("fsspec")
    try:
        import s3fs  # noqa: F401
    except ImportError:
        (outcome,) = download(folders, "s3://bucket/a.mp4")
        assert outcome.error == "missing_package"
        assert "vidpipe[s3]" in outcome.message
        with pytest.raises(StageError, match=r"vidpipe\[s3\]"):
            Download(DownloadSettings(), Context(folders.workdir, "s3://bucket")).check()
    else:
        pytest.skip("s3fs is installed")


def test_a_remote_workdir_takes_no_media(folders: Context) -> None:
    context = Context(workdir="memory://work", root=folders.root)
    Path(folders.root, "a.mp4").write_bytes(b"x")
    assert download(context, "a.mp4")[0]["bytes"] == 1
    with pytest.raises(StageError, match="is remote"):
        download(context, "memory://bucket/a.mp4")
    with pytest.raises(StageError, match="is remote"):
        Download(DownloadSettings(), Context("memory://work", "memory://table")).check()


def test_only_what_changes_results_is_in_the_fingerprint(folders: Context) -> None:
    def fingerprint(context: Context = folders, **settings: object) -> str:
        return Download(DownloadSettings(**settings), context).fingerprint

    assert fingerprint() == fingerprint(connections=1, timeout=1, retries=0, backoff=9, workers=3)
    # Limits decide who fails; what came through under others is the same file.
    assert fingerprint() == fingerprint(max_bytes=1, allow_outside=True, schemes=["https"])
    assert fingerprint() != fingerprint(Context(folders.workdir, "/elsewhere"))


@pytest.mark.parametrize(
    ("uri", "suffix"),
    [
        ("/a/b.MP4", ".mp4"),
        ("https://h/v.webm?x=a.exe", ".webm"),
        ("https://h/watch?v=3", ""),
        ("/a/b.tar.gz!", ""),
        ("/a.b/c", ""),
    ],
)
def test_the_suffix_is_that_of_the_file(uri: str, suffix: str) -> None:
    assert suffix_of(Place(uri)) == suffix
