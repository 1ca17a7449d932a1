"""Where the files of a source lie, in what state they are, and which are videos.

A folder is walked in the order of the full paths, one directory in memory at a time. Hidden files
are left out; links are followed, except into a folder that they lie in.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import hashlib
import itertools
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import fsspec

from manifests.schema import digest
from manifests.tables import File, SourceError, text_lines

# No .gif: most of them are pictures.
VIDEO_EXTENSIONS = (
    *(".3gp", ".avi", ".flv", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4"),
    *(".mpeg", ".mpg", ".mts", ".mxf", ".ogv", ".ts", ".webm", ".wmv"),
)
_MAGIC = re.compile(r"[*?\[]")
# What file systems report about a content, by their own names. Not the local `created`, the ctime:
# a hard link changes it.
_STATE = (
    *("size", "mtime", "ETag", "etag", "LastModified", "last_modified", "updated", "modified"),
    *("generation", "md5Hash", "content_md5", "version_id"),
)


class Video(NamedTuple):
    uri: str  # relative to the folder, with slashes
    caption: str | None
    version: str  # changes when the file's content may have
    flaw: str | None = None  # why this one can't be taken in, where it can't


def is_video(name: str) -> bool:
    return name.lower().endswith(VIDEO_EXTENSIONS)


def absolute(url: str) -> str:
    """The absolute path of a local folder, the URL of any other."""
    if "::" in url:
        return url
    fs, path = _locate(url)
    return _shown(fs, path)


def parent(url: str) -> str:
    """The folder that a file, or every file of a glob, lies in."""
    if "::" in url:  # of a chain, the first part that has a path says where in it we are
        links = url.split("::")
        at = 0 if "://" in links[0] else len(links) - 1
        head, sep, path = links[at].rpartition("://")
        links[at] = head + sep + path.rpartition("/")[0]
        return "::".join(links)
    fs, path = _locate(url)
    return _shown(fs, _base(fs, path))


def files(url: str) -> list[File]:
    """The file, or the files of the glob in the order of their paths. Raises SourceError."""
    fs, path = _locate(url)
    fs.invalidate_cache()
    base = _base(fs, path)
    found = [path]
    if (kind := _kind(fs, path)) != "file":
        shown = _shown(fs, path)
        if kind:
            raise SourceError(
                f"{shown} is a folder, where a file must be: name the file or a glob "
                f"({shown}/*.parquet), or set `kind: folder` to read the videos in it."
            )
        if not _MAGIC.search(path):
            raise SourceError(f"there is no file {shown}: check `path`.")
        visible = [p for p in sorted(fs.glob(path)) if not _is_hidden(p[len(base) :])]
        found = [p for p in visible if _kind(fs, p) == "file"]
        if not found:
            raise SourceError(f"no file matches {shown}: check `path`.")
    return [File(fs, p, p[len(base) :].lstrip("/"), _shown(fs, p)) for p in found]


def state(found: Sequence[File]) -> str:
    """Changes when a file's content may have."""
    try:
        return digest([[file.path, _facts(file.fs.info(file.path))] for file in found])
    except OSError as error:
        raise SourceError(f"{found[0].shown} can't be looked up: {error}.") from error


def folder_state(url: str, patterns: Sequence[str], recursive: bool) -> str:
    """Changes when a video or a caption of the folder may have."""
    fs, path = _folder(url)
    hashed = hashlib.sha256()
    for relative, info, caption in _walk(fs, path, "", patterns, recursive, ()):
        facts = [relative, _facts(info), caption and _facts(caption)]
        hashed.update(digest(facts).encode())
    return hashed.hexdigest()


def videos(url: str, patterns: Sequence[str], recursive: bool, encoding: str) -> Iterator[Video]:
    """The folder's videos, each with the text of `<stem>.txt` beside it. Raises SourceError."""
    fs, path = _folder(url)
    empty = True
    for relative, info, caption in _walk(fs, path, "", patterns, recursive, ()):
        empty = False
        version = digest(_facts(info))
        try:
            relative.encode()
        except UnicodeEncodeError:
            shown = relative.encode("utf-8", "backslashreplace").decode()
            yield Video(shown, None, version, f"the file name {shown} is not UTF-8: rename it")
            continue
        try:
            text = _caption(fs, caption["name"], encoding) if caption else None
        except SourceError as error:
            yield Video(relative, None, version, str(error))
            continue
        yield Video(relative, text, version)
    if empty:
        wanted = ", ".join(patterns) or ", ".join(VIDEO_EXTENSIONS)
        raise SourceError(
            f"{_shown(fs, path)} has no videos ({wanted}): check `path`"
            + (" and `patterns`." if patterns else ", or name others under `patterns`.")
        )


def pair_files(prompts: str, videos: str | None) -> list[File]:
    """The file of prompts and that of videos: a relative name lies beside the prompts."""
    first, *more = files(prompts)
    if more:
        raise SourceError(f"{prompts} are {len(more) + 1} files: name one file of prompts.")
    if videos is not None and ("://" in videos or videos.startswith(("/", "~"))):
        return [first, files(videos)[0]]
    name = videos or "videos.txt"
    second = File(first.fs, f"{_base(first.fs, first.path)}/{name}", name, "")
    second = dataclasses.replace(second, shown=_shown(first.fs, second.path))
    if _kind(second.fs, second.path) != "file":
        raise SourceError(f"there is no file {second.shown}: name the one under `videos`.")
    return [first, second]


def pairs(prompts: str, videos: str | None, encoding: str) -> Iterator[tuple[str, int, str, str]]:
    """Name of the prompts, line, prompt, video. Both files are checked before the first pair: a
    line too few in one means that any pair may be wrong. Raises SourceError."""
    both = pair_files(prompts, videos)
    counts = [_count(file, encoding) for file in both]
    if counts[0] != counts[1]:
        short, long = sorted(zip(counts, both), key=lambda pair: pair[0])
        raise SourceError(
            f"{both[0].shown} has {counts[0]} lines and {both[1].shown} has {counts[1]}: "
            f"{short[1].name} ends after line {short[0]}, {long[1].name}:{short[0] + 1} has no "
            "partner. Every prompt must stand in the line of its video."
        )
    lines = zip(*(_trimmed(file, encoding) for file in both))
    for number, (prompt, video) in enumerate(itertools.islice(lines, counts[0]), 1):
        yield both[0].name, number, prompt, video


def _trimmed(file: File, encoding: str) -> Iterator[str]:
    return (line.strip() for line in text_lines(file, encoding, newline=None))


def _count(file: File, encoding: str) -> int:
    """The lines up to the last that is not blank."""
    last = 0
    for number, line in enumerate(_trimmed(file, encoding), 1):
        if line and last != number - 1:
            raise SourceError(
                f"{file.shown}:{last + 1}: the line is blank, so every pair after it would be "
                "shifted. Remove it if it is an accident; for a clip without a prompt use "
                "`kind: csv`."
            )
        last = number if line else last
    if not last:
        raise SourceError(f"{file.shown} is empty: every line must be one prompt or one video.")
    return last


def _locate(url: str) -> tuple[Any, str]:
    try:
        fs, path = fsspec.core.url_to_fs(url)
    except (ImportError, ValueError) as error:
        raise SourceError(f"{url} can't be opened: {error}.") from error
    return fs, path


def _is_local(fs: Any) -> bool:
    return "file" in ((fs.protocol,) if isinstance(fs.protocol, str) else fs.protocol)


def _shown(fs: Any, path: str) -> str:
    return path if _is_local(fs) else str(fs.unstrip_protocol(path))


def _kind(fs: Any, path: str) -> str:
    """ "file", "directory", or empty where there is nothing."""
    try:
        return str(fs.info(path)["type"])
    except FileNotFoundError:
        return ""
    except Exception as error:  # every store's client has errors of its own
        raise SourceError(
            f"{_shown(fs, path)} can't be looked up: {error or type(error).__name__}. Check "
            "`path`, and that this user may read it."
        ) from error


def _base(fs: Any, path: str) -> str:
    magic = _MAGIC.search(path)
    if magic and not fs.isfile(path):
        path = path[: magic.start()]
    return path.rpartition("/")[0]


def _is_hidden(path: str) -> bool:
    return any(part.startswith(".") for part in path.split("/"))


def _facts(info: dict[str, Any]) -> dict[str, str]:
    keys = _STATE if "mtime" in info else (*_STATE, "created")
    return {key: str(info[key]) for key in keys if info.get(key) is not None}


def _folder(url: str) -> tuple[Any, str]:
    fs, path = _locate(url)
    fs.invalidate_cache()
    kind = _kind(fs, path)
    if not kind:
        raise SourceError(f"there is no folder {_shown(fs, path)}: check `path`.")
    if kind != "directory":
        raise SourceError(
            f"{_shown(fs, path)} is a file, where a folder of videos must be: name its folder, or "
            "set `kind` to what the file is."
        )
    return fs, path


_Found = tuple[str, dict[str, Any], dict[str, Any] | None]


def _walk(
    fs: Any,
    folder: str,
    prefix: str,
    patterns: Sequence[str],
    recursive: bool,
    above: tuple[str, ...],
) -> Iterator[_Found]:
    """Relative path, facts, and facts of the caption file, of every video under `folder`."""
    above = (*above, _real(fs, folder))
    try:
        entries = [_followed(fs, entry) for entry in fs.ls(folder, detail=True)]
    except OSError as error:
        raise SourceError(f"{_shown(fs, folder)} can't be listed: {error}.") from error
    # A folder sorts as its files will: "a/b.mp4" comes after "a.mp4".
    listed = {_name(e) + ("/" if e["type"] == "directory" else ""): e for e in entries}
    for name, entry in sorted(listed.items()):
        path = entry["name"].rstrip("/")
        if name.startswith((".", "/")) or path == folder.rstrip("/"):
            continue  # object stores list a folder inside of itself
        if name.endswith("/"):
            if recursive and _real(fs, path) not in above:
                yield from _walk(fs, path, prefix + name, patterns, recursive, above)
        elif _is_wanted(name, prefix, patterns):
            yield prefix + name, entry, listed.get(name.rpartition(".")[0] + ".txt")


def _name(entry: dict[str, Any]) -> str:
    return str(entry["name"]).rstrip("/").rpartition("/")[2]


def _is_wanted(name: str, prefix: str, patterns: Sequence[str]) -> bool:
    if not patterns:
        return is_video(name)
    return any(
        fnmatch.fnmatchcase((prefix + name if "/" in p else name).lower(), p.lower())
        for p in patterns
    )


def _followed(fs: Any, entry: dict[str, Any]) -> dict[str, Any]:
    """What a link leads to; a link that leads nowhere stays, for its row to fail."""
    if not entry.get("islink"):
        return entry
    try:
        return dict(fs.info(entry["name"]))
    except OSError:
        return entry


def _real(fs: Any, path: str) -> str:
    return os.path.realpath(path) if _is_local(fs) else path


def _caption(fs: Any, path: str, encoding: str) -> str:
    file = File(fs, path, path, _shown(fs, path))
    return "".join(text_lines(file, encoding)).rstrip("\r\n")
