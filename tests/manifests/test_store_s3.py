"""The store on a real S3 server: creates are exclusive, lost answers are recognised, faults end as
sentences, and what another process has written is seen."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import uuid
from pathlib import Path

import fsspec
import pyarrow as pa
import pytest
from racing import race
from s3_faults import BUCKET, Proxy
from s3fs.core import S3File

from manifests.log import Counts, Log
from manifests.shards import EMBEDDINGS, INDEX, Index, LatentSpec, write_index
from manifests.store import Store, StoreError, StoreUnusable
from manifests.stored import StoredEmbeddings

TABLE = pa.table({"clip_id": ["a", "b"], "n": [1, 2], "blob": pa.array([b"x" * 9, b"y"])})


@pytest.fixture
def store(s3: Proxy, monkeypatch: pytest.MonkeyPatch) -> Store:
    store = Store(f"s3://{BUCKET}/{uuid.uuid4().hex[:8]}")
    monkeypatch.setattr(type(store.fs), "retries", 2)  # s3fs' own tries, around botocore's
    return store


def test_what_is_written_is_read_back_to_the_byte(store: Store) -> None:
    data = bytes(range(256)) * 5000
    assert store.create("a/b.json", data)
    assert store.read("a/b.json") == data
    assert store.find("a") == ["a/b.json"]
    assert store.listing("a")["a/b.json"].size == len(data)
    assert store.find("nothing") == []
    with pytest.raises(FileNotFoundError):
        store.read("nothing")
    store.delete("a/b.json")
    store.delete("a/b.json")
    assert store.find("a") == []


def test_of_many_creators_one_wins(store: Store) -> None:
    race(store)


RACER = """
import sys
from manifests.store import Store
store = Store(sys.argv[1])
sys.stdin.readline()
print(*[n for n in range(20) if store.create(f"commits/{n:06d}.json", sys.argv[2].encode())])
"""


def test_of_many_processes_one_wins_each_commit(store: Store) -> None:
    root = Path(__file__).parents[2]
    racers = [
        subprocess.Popen(
            [sys.executable, "-c", RACER, store.url, f"racer {n}"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root,
        )
        for n in range(3)
    ]  # fmt: skip
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write("go\n")
        racer.stdin.flush()
    won = [[int(n) for n in r.communicate(timeout=60)[0].split()] for r in racers]
    assert sorted(n for numbers in won for n in numbers) == list(range(20))
    for racer, numbers in enumerate(won):
        stands = {store.read(f"commits/{n:06d}.json") for n in numbers}
        assert stands <= {f"racer {racer}".encode()}


def test_a_lost_answer_to_a_create_is_recognised_as_ours(store: Store, s3: Proxy) -> None:
    lost = s3.fault("lost", "PUT", "mine", times=1)
    assert store.create("mine", b"mine")
    assert lost.seen == 1 and s3.count("PUT", "mine") == 2, "the second try met the first"
    assert not store.create("mine", b"theirs")


def test_a_create_whose_every_answer_is_lost_is_still_ours(store: Store, s3: Proxy) -> None:
    s3.fault("lost", "PUT", "mine")
    assert store.create("mine", b"mine")
    assert not store.create("mine", b"theirs")
    assert store.read("mine") == b"mine"


@pytest.mark.parametrize("kind", ["500", "503", "cut", "slow"])
def test_a_fault_that_passes_is_not_noticed(store: Store, s3: Proxy, kind: str) -> None:
    for method in ("PUT", "GET", "HEAD"):
        s3.fault(kind, method, times=1)
    log = Log(store, "probe", "f00")
    commit = log.append("u1", 0, "s", Counts(), TABLE)
    assert commit is not None and commit.data is not None
    assert Log(Store(store.url), "probe", "f00").commits("u1") == [commit]
    assert Store(store.url).read_parquet(log.data_name("u1", commit)).equals(TABLE)


@pytest.mark.parametrize("kind", ["500", "503", "cut"])
def test_a_fault_that_stays_is_a_sentence_and_bounded(store: Store, s3: Proxy, kind: str) -> None:
    store.create("there", b"1")
    for method in ("PUT", "GET", "HEAD"):
        s3.fault(kind, method)
    s3.requests.clear()
    for attempt in (
        lambda: store.create("commit", b"mine"),
        lambda: store.read("there"),
        lambda: store.find(""),
        lambda: store.write_parquet("x.parquet", TABLE),
    ):
        with pytest.raises(StoreUnusable) as caught:
            attempt()
        said = str(caught.value)
        assert store.url in said and "AWS_ENDPOINT_URL" in said and "`vidpipe run`" in said
        assert "Traceback" not in said and "\n" not in said
        assert "planted" not in said, "a secret"
    assert len(s3.requests) <= 60
    s3.reset()
    assert store.find("") == ["there"], "nothing that counts was left"


def test_what_another_process_commits_is_seen(store: Store, s3: Proxy) -> None:
    assert store.find("") == []
    log = Log(store, "probe", "f00")
    log.append("u1", 0, "s", Counts(), TABLE)
    assert len(store.find("probe")) == 2
    store.fs.ls(store.path("probe/f00/u1"))  # what a cache would remember
    writer = (
        "import sys, pyarrow as pa; from manifests.log import Counts, Log;"
        "from manifests.store import Store; log = Log(Store(sys.argv[1]), 'probe', 'f00');"
        "print(log.append('u1', 1, 's', Counts(), pa.table({'clip_id': ['c']})).data)"
    )
    done = subprocess.run(
        [sys.executable, "-c", writer, store.url],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    data = done.stdout.strip()
    assert len(store.find("probe")) == 4
    assert [c.seq for c in log.commits("u1")] == [0, 1]
    assert store.read_parquet(f"probe/f00/u1/{data}").column("clip_id").to_pylist() == ["c"]


def big(mib: int) -> pa.Table:
    blob = bytes(range(256)) * (mib << 12)
    return pa.table({"clip_id": ["a", "b"], "latents": pa.array([blob, blob], pa.binary())})


def test_a_large_file_is_uploaded_in_parts_and_whole(store: Store, s3: Proxy) -> None:
    sha256, size = store.write_parquet("x/big.parquet", big(30))
    assert s3.count("PUT", "partNumber=") > 1
    data = store.read("x/big.parquet")
    assert len(data) == size > 60 << 20
    assert hashlib.sha256(data).hexdigest() == sha256


@pytest.mark.parametrize(("method", "part"), [("PUT", "partNumber="), ("POST", "uploadId=")])
def test_a_large_upload_that_fails_leaves_nothing(
    store: Store, s3: Proxy, method: str, part: str
) -> None:
    s3.fault("500", method, part)
    log = Log(store, "encode", "f00")
    with pytest.raises(StoreUnusable, match="encode/f00/u1"):
        log.append("u1", 0, "s", Counts(), big(30))
    s3.reset()
    assert store.find("") == []
    uploads = store.fs.call_s3("list_multipart_uploads", Bucket=BUCKET)
    assert not uploads.get("Uploads"), "parts of it would be stored, and paid for, for ever"


def test_a_large_upload_whose_last_answer_is_lost_is_whole(store: Store, s3: Proxy) -> None:
    s3.fault("lost", "POST", "uploadId=")
    sha256, size = store.write_parquet("x/big.parquet", big(30))
    data = store.read("x/big.parquet")
    assert (hashlib.sha256(data).hexdigest(), len(data)) == (sha256, size)


def test_an_exception_midway_uploads_no_half_file(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(table: pa.Table, file: object, **options: object) -> None:
        file.write(b"half of it")  # type: ignore[attr-defined]
        raise MemoryError

    monkeypatch.setattr("manifests.store.pq.write_table", write)
    with pytest.raises(StoreUnusable):
        store.write_parquet("x.parquet", TABLE)
    assert store.find("") == []


def test_a_store_that_ignores_the_condition_is_found_out_first(store: Store, s3: Proxy) -> None:
    store.prove()
    s3.fault("unconditional", "PUT")
    with pytest.raises(StoreError, match="no conditional put"):
        store.prove()
    assert store.find("") == []


def test_a_bucket_that_is_not_there_is_named(s3: Proxy) -> None:
    with pytest.raises(StoreUnusable, match=r"s3://nowhere/x/.*no such bucket"):
        Store("s3://nowhere/x").prove()


def test_secrets_in_the_address_are_left_out(s3: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:planted-password@127.0.0.1:9")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(StoreUnusable) as caught:
        Store(f"s3://{BUCKET}/other").prove()
    assert "planted" not in str(caught.value)


def test_embeddings_that_are_there_are_found(store: Store, s3: Proxy) -> None:
    log, stored = Log(store, "embed", "f"), StoredEmbeddings(store.url, "embed", "f")
    stored.look()
    keys = [f"{n}" * 32 for n in range(4)]
    for n, key in enumerate(keys):
        row = {"embedding": b"%d" % n, "embedding_key": key, "embedding_row": 0}
        table = pa.Table.from_pylist([dict.fromkeys(EMBEDDINGS.names) | row], EMBEDDINGS)
        assert log.append(f"u{n}", 0, "", Counts(), table)
    assert not stored.find(keys)
    stored.look()
    found = stored.find([*keys, "e" * 32])
    assert {key: row["embedding"] for key, row in found.items()} == {
        key: b"%d" % n for n, key in enumerate(keys)
    }


def test_columns_are_read_without_the_payload_after_them(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """s3fs would read 50 MiB ahead: all latents or embeddings, to learn of which clips they are."""
    blobs = pa.array([bytes(1 << 18)] * 16)
    store.write_parquet("t.parquet", pa.table({"n": list(range(16)), "blob": blobs}))
    fetched: list[int] = []
    plain = S3File._fetch_range

    def noted(file: S3File, start: int, end: int) -> bytes:
        fetched.append(end - start)
        return plain(file, start, end)

    monkeypatch.setattr(S3File, "_fetch_range", noted)
    assert store.read_parquet("t.parquet", ["n"]).column("n").to_pylist() == list(range(16))
    assert fetched and sum(fetched) < 1 << 18


def test_the_index_is_written_and_opened(store: Store, s3: Proxy) -> None:
    spec = LatentSpec("v", "AutoencoderKL", "", "f", False, 1, 1, 8, [0.0], [1.0])
    row = {"clip_id": "a", "caption": "c", "shard": "s", "row": 0, "shape": [1]}
    url = f"{store.url}/index/train.parquet"
    for caption in ("old", "new"):
        table = pa.Table.from_pylist([{**row, "caption": caption}], schema=INDEX)
        write_index(url, store.url, [table], spec, {})
        assert Index.open(url).table.column("caption").to_pylist() == [caption]
    assert store.find("index") == ["index/train.parquet"]
    s3.fault("500", "PUT")
    with pytest.raises(StoreUnusable, match=r"train\.parquet"):
        write_index(url, store.url, [table], spec, {})
