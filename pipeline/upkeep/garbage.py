"""`vidpipe gc`: what a workdir no longer needs.

Every file is listed before the commits are read, so what a commit names is never taken for an
orphan, and nothing younger than a grace period is touched: a run that goes on, or one that was just
killed, keeps all it has. Only files whose names vidpipe itself gives are looked at.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

import numpy as np
import pyarrow.compute as pc

from manifests.log import SNAPSHOTS, Log, standing
from manifests.scans import SCANS
from manifests.schema import KEPT
from manifests.store import Store
from pipeline.dag import Pipeline
from pipeline.upkeep.verify import snapshot_lines

DATA = "data that no commit names"
PARTS = "unfinished files"
UPLOADS = "unfinished uploads"
COMMITS = "commits that a snapshot holds"
OLD_SNAPSHOTS = "snapshots before the last"
ASIDE = "damaged files put aside"
MEDIA = "downloads that no clip refers to"
UNUSED = "settings not in use"

_HEX = "[0-9a-f]"
_UNIT = rf"(?:\d{{6,}}-{_HEX}{{12}})"
_LOG = re.compile(rf"([^/]+)/({_HEX}{{16}}|pool)/(?:{_UNIT}|{SNAPSHOTS})/[^/]+")
_COMMIT = re.compile(r".*/(\d{6,})\.json")
_PARQUET = re.compile(rf".*/({_HEX}{{12}}\.parquet)")
_SNAPSHOT = re.compile(rf".*/{SNAPSHOTS}/\d{{6,}}\.jsonl")
_PART = re.compile(rf"(.*/)?\.?[^/]+\.{_HEX}{{32}}\.part")
_ASIDE = re.compile(r".*\.damaged")
_PROBE = re.compile(rf"\.probe/{_HEX}{{32}}")
_MEDIUM_ASIDE = re.compile(rf"media/{_HEX}{{2}}/{_HEX}{{64}}.*\.damaged")
_MEDIUM = re.compile(rf"media/{_HEX}{{2}}/({_HEX}{{64}})(?:\.[a-z0-9]{{1,8}})?")
_MEDIA_PART = re.compile(rf"media/\.part/{_HEX}{{64}}(?:\.tag|\.lock|\.record)?")
_ADDRESS = re.compile(rf"media/\.uri/{_HEX}{{2}}/{_HEX}{{64}}\.json")


@dataclass
class Found:
    """Files of one kind. `log` is the stage and fingerprint of settings that are not in use."""

    kind: str
    log: str | None = None
    files: int = 0
    bytes: int = 0
    removed: bool = False
    names: list[str] = field(default_factory=list, repr=False)

    def add(self, name: str, size: int) -> None:
        self.names.append(name)
        self.files += 1
        self.bytes += size

    def to_json(self) -> dict[str, Any]:
        stage, _, fingerprint = (self.log or "").partition("/")
        apart = {"stage": stage, "fingerprint": fingerprint} if self.log else {}
        own = {"files": self.files, "bytes": self.bytes, "removed": self.removed}
        return {"kind": self.kind, **apart, **own}


def collect(
    pipeline: Pipeline, grace: float, delete: bool = False, fingerprints: bool = False
) -> list[Found]:
    """Finds what is older than `grace` seconds and no longer needed; removes it with `delete`, and
    the results of settings that this configuration does not use only with `fingerprints` too.

    Killed midway it has removed a part, and nothing that is needed. Raises StoreError where a
    commit is damaged: then nobody can tell what it named.
    """
    store, before = pipeline.store, time.time() - grace
    found: list[Found] = []
    for group in _all(pipeline, before):
        if delete and group.files and (group.kind != UNUSED or fingerprints):
            _remove(store, group, before)
        group.names.clear()
        if group.files:
            found.append(group)
    return found


def _all(pipeline: Pipeline, before: float) -> Iterator[Found]:
    store = pipeline.store
    in_use = {(name, layer.fingerprint) for name, layer in pipeline.dag.layers.items()}
    for stage, fingerprint in sorted({*_logs(store), *in_use}):
        log = Log(store, stage, fingerprint)
        if (stage, fingerprint) in in_use:
            yield from _of_log(log, before)
        else:
            yield _unused(log, before)
    yield from _apart(store, before)
    yield from _media(store, before)
    yield from _uploads(store, before)


def _logs(store: Store) -> Iterator[tuple[str, str]]:
    """Every stage and fingerprint with files of ours. The folder of training is not looked into."""
    for stage in _folders(store, ""):
        if re.fullmatch(r"\w[\w.-]*", stage) and stage not in ("train", "media", "index"):
            for fingerprint in _folders(store, stage):
                if re.fullmatch(rf"{_HEX}{{16}}", fingerprint):
                    yield stage, fingerprint


def _folders(store: Store, name: str) -> list[str]:
    try:
        entries = store.fs.ls(store.path(name).rstrip("/"), detail=True)
    except FileNotFoundError:
        return []
    return [e["name"].rstrip("/").rpartition("/")[2] for e in entries if e["type"] == "directory"]


def _of_log(log: Log, before: float) -> Iterator[Found]:
    """A log in use: what no commit names, what a snapshot holds, what a crash left."""
    listed = log.store.listing(log.prefix)
    old = {name: info for name, info in listed.items() if info.modified < before}
    named, covered = set[str](), dict[str, int]()
    units = log.units()  # after the listing: what has been committed meanwhile is named
    for unit, history in units.items():
        named.update(log.data_name(unit, c) for c in standing(log.commits(unit, history)))
    snapshots = log.snapshots()
    aged = [name for name in snapshots if name in old]
    if aged:
        # Who listed the workdir before a young snapshot was made may still read what it holds.
        lines, _ = snapshot_lines(log.store, aged[-1])
        last, _ = snapshot_lines(log.store, snapshots[-1])
        covered = {unit: min(len(own), len(last.get(unit, ()))) for unit, own in lines.items()}
    kinds = {kind: Found(kind) for kind in (DATA, PARTS, COMMITS, OLD_SNAPSHOTS, ASIDE)}
    for name, info in old.items():
        commit = _COMMIT.fullmatch(name)
        if not _LOG.fullmatch(name):
            continue
        if _PART.fullmatch(name):
            kinds[PARTS].add(name, info.size)
        elif _ASIDE.fullmatch(name):
            kinds[ASIDE].add(name, info.size)
        elif _SNAPSHOT.fullmatch(name):
            if name in aged[:-1]:
                kinds[OLD_SNAPSHOTS].add(name, info.size)
        elif commit and int(commit[1]) < covered.get(name.rsplit("/", 2)[1], 0):
            kinds[COMMITS].add(name, info.size)
        elif _PARQUET.fullmatch(name) and name not in named:
            kinds[DATA].add(name, info.size)
    yield from kinds.values()


def _unused(log: Log, before: float) -> Found:
    """All of a log that this configuration has no use for; nothing of it if any file is young."""
    group = Found(UNUSED, log.prefix)
    listed = {n: info for n, info in log.store.listing(log.prefix).items() if _LOG.fullmatch(n)}
    if any(info.modified >= before for info in listed.values()):
        return group
    # Killed midway, it must leave what was once a state of the log: the last commits go first, and
    # the data that they name after all of them.
    for name in sorted(listed, key=_last_first):
        group.add(name, listed[name].size)
    return group


def _last_first(name: str) -> tuple[int, int, str]:
    commit = _COMMIT.fullmatch(name)
    if commit:
        return (0, -int(commit[1]), name)
    if _SNAPSHOT.fullmatch(name):
        return (1, -int(name[-12:-6]), name)
    return (2, 0, name)


def _apart(store: Store, before: float) -> Iterator[Found]:
    """What crashes left beside the logs."""
    parts, aside = Found(PARTS), Found(ASIDE)
    for prefix in (SCANS, "index", ".probe"):
        for name, info in store.listing(prefix).items():
            if info.modified < before and (_PART.fullmatch(name) or _PROBE.fullmatch(name)):
                parts.add(name, info.size)
            elif info.modified < before and _ASIDE.fullmatch(name):
                aside.add(name, info.size)
    yield parts
    yield aside


def _media(store: Store, before: float) -> Iterator[Found]:
    """Downloaded files that no kept row of any download refers to, and the notes of where they
    came from."""
    media, parts, aside = Found(MEDIA), Found(PARTS), Found(ASIDE)
    folders = _folders(store, "media")
    # Known before they are listed: a download that meets an old file touches it, and then it is
    # young. Folder by folder: there may be millions.
    referred = _referred(store) if folders else np.array([], np.uint64)
    inner = [f".uri/{name}" for name in _folders(store, "media/.uri")]
    places = [f"media/{name}" for name in (*folders, *inner) if name != ".uri"]
    for name, info in ((n, i) for place in places for n, i in store.listing(place).items()):
        if info.modified >= before:
            continue
        medium = _MEDIUM.fullmatch(name)
        if _MEDIA_PART.fullmatch(name):
            parts.add(name, info.size)
        elif _MEDIUM_ASIDE.fullmatch(name):
            aside.add(name, info.size)
        elif medium and not _is_in(referred, medium[1]):
            media.add(name, info.size)
        elif _ADDRESS.fullmatch(name):
            content = _content_of(store, name)
            if content is not None and not _is_in(referred, content):
                media.add(name, info.size)
    yield from (media, parts, aside)


def _referred(store: Store) -> np.ndarray[Any, np.dtype[np.uint64]]:
    """The first 8 bytes of the sha256 of every file that a kept row of a download refers to,
    sorted: 80 MB for 10 million. Two alike keep a file that could go, never the reverse."""
    heads = [np.array([], np.uint64)]
    for fingerprint in _folders(store, "download"):
        log = Log(store, "download", fingerprint)
        for unit, history in log.units().items():
            for commit in standing(log.commits(unit, history)):
                table = store.read_parquet(log.data_name(unit, commit), ["outcome", "content"])
                kept = table.filter(pc.equal(table.column("outcome"), KEPT)).column("content")
                heads.append(np.array([_head(c) for c in kept.to_pylist() if c], np.uint64))
    return np.unique(np.concatenate(heads))


def _head(content: str) -> int:
    return int(content[:16], 16)


def _is_in(referred: np.ndarray[Any, np.dtype[np.uint64]], content: str) -> bool:
    at = int(np.searchsorted(referred, np.uint64(_head(content))))
    return at < len(referred) and int(referred[at]) == _head(content)


def _content_of(store: Store, name: str) -> str | None:
    try:
        content = json.loads(store.read(name))["content"]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return content if isinstance(content, str) and re.fullmatch(r"[0-9a-f]{64}", content) else None


def _uploads(store: Store, before: float) -> Iterator[Found]:
    """Parts of large files whose upload was broken off by a crash: S3 keeps, and bills, them."""
    if not hasattr(store.fs, "list_multipart_uploads"):
        return
    bucket, _, prefix = store.root.partition("/")
    group = Found(UPLOADS)
    for upload in store.fs.list_multipart_uploads(bucket):
        begun = upload["Initiated"]
        assert isinstance(begun, datetime)
        if upload["Key"].startswith(f"{prefix}/") and begun.timestamp() < before:
            group.add(f"{upload['UploadId']}:{upload['Key']}", 0)
    yield group


def _remove(store: Store, group: Found, before: float) -> None:
    if group.kind == UPLOADS:
        for name in group.names:
            upload, _, key = name.partition(":")
            store.fs.abort_mpu(store.root.partition("/")[0], key, upload)
    elif group.kind == MEDIA and store.local:
        # A download that meets a file it knows touches it, and commits its row only later.
        for name in group.names:
            if all(info.modified < before for info in store.listing(name).values()):
                store.delete(name)
    else:
        store.delete_many(group.names)
    if group.log is not None:
        store.prune(group.log)
    group.removed = True
