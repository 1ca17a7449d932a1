"""`vidpipe export`: clips of the index to the files of a trainer's layout, by key.

Every clip's latents are joined by its id and its embedding by its key; what stands elsewhere than
the index says ends the export. Files are written whole under another name and then moved, and those
that were made of the same before are left as they are: an export that was broken off goes on.
"""

from __future__ import annotations

import contextlib
import filecmp
import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from manifests.faults import unusable
from manifests.redact import redact
from manifests.shards import (
    Embedding,
    Index,
    Latent,
    ShardError,
    read_embeddings,
    read_latents,
)
from manifests.view import UnitView
from pipeline import index as training_index
from pipeline.dag import Pipeline
from pipeline.export import TARGETS
from pipeline.export.base import Clip, Entry, ExportError, Item, Kind, Options, Target, Video
from pipeline.export.ledger import Ledger
from stages.files import local_path

# Clips whose embeddings are in memory at once.
AT_ONCE = 16
_PARTS = ".parts"


@dataclass
class Summary:
    """What an export came to, in files unless it says clips."""

    target: str
    clips: int = 0
    left_out: Counter[str] = field(default_factory=Counter)  # clips, by why
    written: int = 0
    kept: int = 0
    removed: int = 0
    bytes: int = 0


@dataclass(frozen=True)
class _Facts:
    """What the joined view tells of a clip beside the index."""

    fps: float
    video: Video | None


def export(
    pipeline: Pipeline,
    name: str,
    out: str,
    options: Options = Options(),  # noqa: B008  frozen
    limit: int | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] = lambda done, clips: None,
) -> Summary:
    """Brings the export in folder `out` up to date with the index. A clip that left the index is
    removed, unless only the first `limit` clips are asked for; `overwrite` trusts no file.

    Raises ExportError, ShardError or StoreError.
    """
    if "://" in out:
        raise ExportError(f"an export can't go to {out}: name a local folder")
    if "encode" not in pipeline.stages:
        raise ExportError("there is no encode stage: `encode.enabled` is false")
    folder = Path(out).absolute()
    ready = training_index.refresh(pipeline)
    if ready == 0 or not pipeline.store.exists(training_index.INDEX_NAME):
        raise ExportError("no clip is ready to export: `vidpipe run` first")
    opened = Index.open(training_index.path(pipeline))
    target = TARGETS[name](opened, options, folder)
    target.check()
    return _Export(pipeline, target, limit, overwrite, progress).run()


class _Export:
    def __init__(
        self,
        pipeline: Pipeline,
        target: Target,
        limit: int | None,
        overwrite: bool,
        progress: Callable[[int, int], None],
    ) -> None:
        self._pipeline, self._target, self._folder = pipeline, target, target.folder
        self._limit, self._overwrite, self._progress = limit, overwrite, progress
        self._facts = lru_cache(maxsize=2)(self._facts_of)
        self._summary = Summary(target.name)

    def run(self) -> Summary:
        clips = sum(len(entries) for entries in self._shards(captions=False))
        if not clips:
            raise ExportError(f"no clip can be exported: all are {self._left_out()}")
        self._ledger = Ledger(self._folder, self._target.name)
        parts = self._folder / _PARTS
        try:
            shutil.rmtree(parts, ignore_errors=True)
            parts.mkdir()
            if self._target.numbered:
                ids = (
                    entry.clip_id for entries in self._shards(captions=False) for entry in entries
                )
                self._ledger.number(ids, self._limit is None)
            for entries in self._shards():
                self._shard(entries)
                self._summary.clips += len(entries)
                self._progress(self._summary.clips, clips)
            self._lists()
            if self._limit is None:
                for name in self._ledger.unwanted():
                    self._remove(name)
            return self._summary
        except (OSError, sqlite3.Error) as error:
            raise unusable(error, "write", str(self._folder)) from error
        finally:
            self._ledger.close()
            shutil.rmtree(parts, ignore_errors=True)

    def _left_out(self) -> str:
        return ", ".join(f"{why} ({n})" for why, n in self._summary.left_out.items())

    # ------------------------------------------------------------------------- which clips

    def _shards(self, captions: bool = True) -> Iterator[list[Entry]]:
        """The clips that the layout takes, in the order of the index, those of a latent shard
        together; without `captions`, these are not fit to be written."""
        table = self._target.index.table
        table = table if self._limit is None else table.slice(0, self._limit)
        shards = table.column("shard").combine_chunks().dictionary_encode().indices.to_numpy()
        ends = [*(np.flatnonzero(np.diff(shards)) + 1), len(table)] if len(table) else []
        begin, left_out = 0, Counter[str]()
        for end in ends:
            rows = table.slice(begin, end - begin).to_pylist()
            begin = int(end)
            taken = []
            for row in rows:
                entry = self._entry(row, captions)
                why = self._target.accepts(entry)
                if why is None:
                    taken.append(entry)
                else:
                    left_out[why] += 1
            if taken:
                yield taken
        self._summary.left_out = left_out

    def _entry(self, row: dict[str, Any], captions: bool) -> Entry:
        caption = row["caption"] or ""
        made = Entry(
            clip_id=row["clip_id"],
            caption=redact(caption) if captions else caption,  # it takes longer than all the rest
            shard=row["shard"],
            row=row["row"],
            shape=tuple(row["shape"]),
            text_key=row["text_key"],
            text_shard=row["text_shard"],
            text_row=row["text_row"],
        )
        if self._target.videos:
            made = replace(made, video=self._of(made).video)
            if made.video is None or "://" in made.video.path:
                raise ExportError(
                    f"{self._target.name} wants the videos themselves, and that of clip "
                    f"{made.clip_id} is not on a local disk: download to a local workdir"
                )
        return made

    def _of(self, entry: Entry) -> _Facts:
        facts = self._facts(entry.shard.split("/")[2])
        if entry.clip_id not in facts:
            raise ShardError(
                f"clip {entry.clip_id} of the index is not in its unit: `vidpipe audit` tells more"
            )
        return facts[entry.clip_id]

    def _facts_of(self, unit: str) -> dict[str, _Facts]:
        """What the joined view tells of a unit's clips, by their ids."""
        pipeline = self._pipeline
        view = UnitView(pipeline.store, pipeline.dag, unit)
        for name in pipeline.dag.layers:
            view.settled(name)
        known = view.table
        wanted = ("clip_id", "path", "content", "start", "end", "latents_fps")
        table = known.select([n for n in wanted if n in known.column_names])
        context = pipeline.stages["encode"].context
        whole = view.source_ids(pa.array(range(len(table)))).to_pylist()
        facts = {}
        for row, source in zip(table.to_pylist(), whole):
            video = None
            if row.get("path"):
                part = (row.get("start"), row.get("end")) != (None, None)
                section = part or source != row["clip_id"]
                where = local_path(row["path"], context)
                video = Video(where, row.get("content") or "", section)
            facts[row["clip_id"]] = _Facts(float(row["latents_fps"] or 0.0), video)
        return facts

    # ------------------------------------------------------------------------- which files

    def _shard(self, entries: Sequence[Entry]) -> None:
        """Writes what the clips of one latent shard lack."""
        if self._target.numbered:
            entries = [replace(e, number=self._ledger.number_of(e.clip_id)) for e in entries]
        stale: dict[str, Item] = {}
        for item in self._target.items(entries):
            if self._stands(item):
                self._summary.kept += item.name not in stale
            else:
                stale[item.name] = item
        if stale:
            self._ledger.forget(stale)
        alone: dict[str, list[Item]] = {}
        for item in stale.values():
            if len(item.entries) == 1:
                alone.setdefault(item.entries[0].clip_id, []).append(item)
            else:
                self._write(item, self._clips([(e, set(item.kinds)) for e in item.entries]))
        wanted = [
            (entry, {kind for item in alone[entry.clip_id] for kind in item.kinds})
            for entry in entries
            if entry.clip_id in alone
        ]
        for clip in self._clips(wanted):
            for item in alone[clip.entry.clip_id]:
                self._write(item, iter([clip]))
            self._ledger.commit()
        self._ledger.commit()

    def _stands(self, item: Item) -> bool:
        if self._overwrite and not self._ledger.wrote(item.name):
            return False
        size = self._ledger.holds(item.name, item.state)
        return size is not None and size == _size(self._folder / item.name)

    def _clips(self, wanted: Sequence[tuple[Entry, set[Kind]]]) -> Iterator[Clip]:
        """The entries, in the order of the index, with what is stored of them, as far as it is
        wanted. A row group of latents is in memory at once, and a few embeddings."""
        latents = self._latents([entry for entry, kinds in wanted if "latents" in kinds])
        firsts = self._latents([e for e, kinds in wanted if "first_frame" in kinds], True)
        waiting = iter(wanted)
        while some := list(islice(waiting, AT_ONCE)):
            texts = self._texts([entry for entry, kinds in some if "text" in kinds])
            for entry, kinds in some:
                yield Clip(
                    entry,
                    self._target.spec,
                    self._of(entry).fps,
                    next(latents) if "latents" in kinds else None,
                    texts.get(entry.clip_id),
                    next(firsts) if "first_frame" in kinds else None,
                )

    def _latents(self, entries: Sequence[Entry], first: bool = False) -> Iterator[Latent]:
        for shard, own in groupby(entries, lambda entry: entry.shard):
            known = list(own)
            rows = [entry.row for entry in known]
            read = read_latents(self._target.index.workdir, shard, rows, first)
            for entry, latent in zip(known, read):
                same = first or latent.shape == entry.shape
                if latent.clip_id != entry.clip_id or not same:
                    raise ShardError(
                        f"shard {shard} holds clip {latent.clip_id} {list(latent.shape)} in row "
                        f"{entry.row}, where the index says clip {entry.clip_id} "
                        f"{list(entry.shape)}: `vidpipe audit` tells more"
                    )
                yield latent

    def _texts(self, entries: Sequence[Entry]) -> dict[str, Embedding]:
        if not self._target.vaes or self._target.wants.encoder is None:
            return {}
        by_key: dict[str | None, Embedding] = {}
        for shard in {entry.text_shard or "" for entry in entries}:
            own = [entry for entry in entries if entry.text_shard == shard]
            keys = {entry.text_row: entry.text_key for entry in own if entry.text_row is not None}
            rows = sorted(keys)
            for row, text in zip(rows, read_embeddings(self._target.index.workdir, shard, rows)):
                if text.key != keys[row]:
                    raise ShardError(
                        f"shard {shard} holds embedding {text.key} in row {row}, where the index "
                        f"says {keys[row]}: `vidpipe audit` tells more"
                    )
                by_key[text.key] = text
        return {entry.clip_id: by_key[entry.text_key] for entry in entries}

    # ------------------------------------------------------------------------- one file

    def _write(self, item: Item, clips: Iterator[Clip]) -> None:
        part = self._folder / _PARTS / "part"
        part.unlink(missing_ok=True)
        self._target.write(item, clips, part)
        self._ledger.put(item.name, item.state, self._place(part, item.name))

    def _place(self, part: Path, name: str) -> int:
        """Gives the file its name; returns its length in bytes."""
        path = self._folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        self._summary.bytes += part.lstat().st_size
        self._summary.written += 1
        # Two links of one file: a rename from one to the other would do nothing.
        if path.exists() and path.samefile(part):
            part.unlink()
        else:
            part.replace(path)
        return path.stat().st_size

    def _lists(self) -> None:
        """The files over all clips; one that says the same as before is left as it is."""
        entries = (entry for shard in self._shards() for entry in shard)
        for name, pieces in self._target.lists(entries).items():
            part, path = self._folder / _PARTS / "part", self._folder / name
            part.unlink(missing_ok=True)
            with part.open("w", encoding="utf-8") as file:
                file.writelines(pieces)
            if path.exists() and filecmp.cmp(part, path, shallow=False):
                self._summary.kept += 1
            else:
                self._place(part, name)
            self._ledger.put(name, "", 0)

    def _remove(self, name: str) -> None:
        path = self._folder / name
        path.unlink(missing_ok=True)
        self._summary.removed += 1
        for parent in path.parents:
            if parent == self._folder:
                break
            with contextlib.suppress(OSError):
                parent.rmdir()


def _size(path: Path) -> int | None:
    """Of the file, or of what it links to; None where there is none."""
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return None
