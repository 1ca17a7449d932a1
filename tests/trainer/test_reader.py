"""What is read of the shards, when, and what is kept: counted at the file system."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from contextlib import closing
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import fsspec
import pyarrow.parquet as pq
import pytest
import torch
from fsspec.implementations.local import LocalFileSystem
from s3_faults import BUCKET, Proxy

from manifests.shards import Index, ShardError, ShardFile
from trainer.data import Loader

ROOT = Path(__file__).parents[2]
SHAPE = (4, 8, 8, 8)  # with its moments 16 KiB
CLIP = 2 * 4 * 8 * 8 * 8 * 4
GROUP = 16  # clips of a row group
MEMORY = 1 << 21


class Counted(LocalFileSystem):
    """The local file system; `reads` are (file, offset, bytes)."""

    protocol = "counted"
    reads: list[tuple[str, int, int]] = []

    def _open(self, path: str, *args: Any, **kwargs: Any) -> Any:
        return CountedFile(super()._open(path, *args, **kwargs), path)


class CountedFile:
    def __init__(self, file: Any, path: str) -> None:
        self._file, self._path = file, path

    def read(self, size: int = -1) -> bytes:
        offset = self._file.tell()
        data: bytes = self._file.read(size)
        Counted.reads.append((self._path, offset, len(data)))
        return data

    def readinto(self, buffer: memoryview) -> int:
        offset = self._file.tell()
        count: int = self._file.readinto(buffer)
        Counted.reads.append((self._path, offset, count))
        return count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@pytest.fixture
def reads() -> list[tuple[str, int, int]]:
    fsspec.register_implementation("counted", Counted, clobber=True)
    Counted.reads.clear()
    return Counted.reads


def counted(made: Any) -> Index:
    index = made.open()
    return replace(index, workdir=f"counted://{index.workdir}")


def settings(made: Any, settings_of: Any, lanes: int = 2) -> Any:
    return settings_of(made, shuffle_window=64, memory=MEMORY, lanes=lanes)


def run(loader: Loader, batches: int) -> int:
    with closing(loader.batches(loader.start())) as source:
        return sum(len(batch.clip_ids) for batch in islice(source, batches))


def groups(made: Any) -> dict[tuple[str, int], int]:
    """Where the latents of each row group lie, and how many bytes they take."""
    found = {}
    for path in made.shards.values():
        metadata = pq.ParquetFile(path).metadata
        for number in range(metadata.num_row_groups):
            group = metadata.row_group(number)
            column = next(
                c
                for n in range(group.num_columns)
                if (c := group.column(n)).path_in_schema == "latents"
            )
            found[str(path), column.data_page_offset] = column.total_compressed_size
    return found


@pytest.mark.parametrize("lanes", [1, 2])
def test_each_row_group_is_read_once_an_epoch_in_one_piece(
    lanes: int, make_index: Any, settings_of: Any, reads: list[tuple[str, int, int]]
) -> None:
    made = make_index(sizes=(64, 96, 32, 128, 64, 96, 48), shape=SHAPE, group=GROUP)
    clips = 528
    loader = Loader(counted(made), settings(made, settings_of, lanes))
    assert loader.order.lanes == lanes and loader.memory == MEMORY < clips * CLIP // 2
    epochs = 3
    assert run(loader, epochs * clips // 4) == epochs * clips
    where = groups(made)
    times: Counter[tuple[str, int]] = Counter()
    for path, offset, size in reads:
        inside = [
            place
            for place, length in where.items()
            if place[0] == path and offset <= place[1] and place[1] + length <= offset + size
        ]
        times.update(inside)
    assert set(times) == set(where)
    # Of the fourth epoch some are read ahead; where two lanes meet, both read the row group.
    ahead = MEMORY // 2 // GROUP // CLIP + 4
    assert epochs * len(where) <= times.total() <= epochs * (len(where) + lanes - 1) + ahead
    assert min(times.values()) == epochs
    if lanes == 1:
        assert max(times.values()) == epochs + 1
    payload = sum(where[place] * count for place, count in times.items())
    others = [size for _, _, size in reads if size < GROUP * CLIP]
    assert sum(size for _, _, size in reads) <= 1.01 * payload + sum(others)
    small = 3 * times.total()  # of each row group: its clips, their shapes and dtypes
    assert len(others) <= 2 * len(made.shards) + small, "footers, each once"
    assert sum(others) < 0.05 * payload + (128 << 10) * len(made.shards)


def test_two_processes_read_shards_of_their_own(
    make_index: Any, settings_of: Any, reads: list[tuple[str, int, int]]
) -> None:
    made = make_index(sizes=(64,) * 10, shape=SHAPE, group=GROUP)
    whole = 640 * CLIP
    files = []
    for rank in range(2):
        reads.clear()
        loader = Loader(counted(made), settings(made, settings_of), rank, 2)
        run(loader, 60)  # of 80; what is read ahead does not reach the epoch's end
        assert sum(size for _, _, size in reads) < 0.65 * whole
        files.append({path for path, _, size in reads if size > GROUP * CLIP})
    assert len(files[0] & files[1]) <= 1 and len(files[0] | files[1]) >= 8


PEAK = """
import sys, tracemalloc
from contextlib import closing
from itertools import islice
import pyarrow as pa
from manifests.shards import Index
from trainer.config import load_settings
from trainer.data import Loader
settings = load_settings(sys.argv[1])
loader = Loader(Index.open(settings.index), settings)
kept, arrow = pa.total_allocated_bytes(), 0
tracemalloc.start()
with closing(loader.batches(loader.start())) as batches:
    for _ in islice(batches, int(sys.argv[2])):
        arrow = max(arrow, pa.total_allocated_bytes() - kept)
print(arrow + tracemalloc.get_traced_memory()[1])
"""


def test_memory_does_not_grow_with_the_number_of_shards(
    make_index: Any, settings_of: Any, tmp_path: Path
) -> None:
    """In processes of their own: tracing is not safe beside threads that other tests have left."""
    peaks = []
    for count in (6, 30):
        made = make_index(sizes=(64,) * count, shape=SHAPE, group=GROUP)
        file = tmp_path / "settings.json"
        file.write_text(settings(made, settings_of).model_dump_json())
        command = [sys.executable, "-c", PEAK, str(file), str(count * 16)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        peaks.append(int(done.stdout))
    # Beside what is wanted: row groups being read, the used rows of others.
    assert MEMORY // 4 < peaks[0] < 2 * MEMORY + 4 * GROUP * CLIP
    assert peaks[1] < peaks[0] + MEMORY // 2  # 30 shards are 30 MiB


def test_too_little_memory_reads_again_and_loses_nothing(make_index: Any, settings_of: Any) -> None:
    made = make_index(sizes=(100, 60), shape=SHAPE, group=50)
    little = Loader(made.open(), settings_of(made, memory=1 << 20, shuffle_window=160))
    assert little.memory == 1 << 20 < 50 * CLIP * 16
    seen = []
    with closing(little.batches(little.start())) as batches:
        for batch in islice(batches, 40):
            seen += batch.clip_ids
    assert sorted(seen) == sorted(made.clips)


def test_an_object_store(make_index: Any, settings_of: Any, s3: Proxy, tmp_path: Path) -> None:
    made = make_index(sizes=(48, 20), shape=SHAPE, group=GROUP, embedded=True)
    here = made.open()
    there = replace(here, workdir=f"s3://{BUCKET}/work")
    fsspec.filesystem("s3").put(f"{here.workdir}/", f"{BUCKET}/work/", recursive=True)
    s3.requests.clear()
    one, other = (
        Loader(index, settings_of(made, text={"kind": "stored"})) for index in (there, here)
    )
    with closing(one.batches(one.start())) as a, closing(other.batches(other.start())) as b:
        for far, near in islice(zip(a, b), 17):
            assert far.clip_ids == near.clip_ids and far.captions == near.captions
            assert torch.equal(far.latents(), near.latents())
            assert far.embeddings is not None and near.embeddings is not None
            assert torch.equal(far.embeddings[0], near.embeddings[0])
    for shard in ("encode/f/u00", "encode/f/u01"):
        # The footer, and each of at most 3 row groups in one piece: an epoch, and its successor's
        # beginning.
        assert 1 <= s3.count("GET", shard) <= 1 + 2 * 3
    fsspec.filesystem("s3").rm(f"{BUCKET}/work/encode/f/u00.parquet")
    lost = Loader(there, settings_of(made))
    with closing(lost.batches(lost.start())) as batches, pytest.raises(ShardError) as error:
        list(islice(batches, 17))
    for part in ("u00.parquet is missing from s3://", "`vidpipe verify"):
        assert part in str(error.value)


def test_a_store_that_does_not_answer(
    make_index: Any, settings_of: Any, s3: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("s3fs.core.S3FileSystem.retries", 1)  # seconds each
    made = make_index(sizes=(4,))
    here = made.open()
    fsspec.filesystem("s3").put(f"{here.workdir}/", f"{BUCKET}/work/", recursive=True)
    loader = Loader(replace(here, workdir=f"s3://{BUCKET}/work"), settings_of(made))
    s3.fault("cut", "GET", "u00")
    with closing(loader.batches(loader.start())) as batches, pytest.raises(ShardError) as error:
        next(batches)
    told = str(error.value)
    assert told.startswith(f"can't read s3://{BUCKET}/work/encode/f/u00.parquet: the store failed")


def test_a_shard_is_read_by_any_thread_and_says_where_it_ends(make_index: Any) -> None:
    made = make_index(sizes=(7,))
    (name,) = made.shards
    with ShardFile(made.open().workdir, name) as file:
        assert file.starts == [0, 3, 6, 7]
        assert [file.group(row) for row in range(7)] == [0, 0, 0, 1, 1, 1, 2]
        assert [latent.clip_id for latent in file.latents([1, 2, 6])] == [
            list(made.clips)[row] for row in (1, 2, 6)
        ]
        with pytest.raises(ShardError, match="has 7 rows, row 7 was asked for"):
            file.group(7)
