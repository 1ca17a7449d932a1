"""download: every clip's file within reach, under the hash of its bytes.

A local file is used where it lies and only hashed. A remote one, or a member of a zip file, is
brought into `<workdir>/media`. From here on a clip's file is known by its content: moving or
renaming it recomputes nothing.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
import stat
import zipfile
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa
from pydantic import Field

from manifests.credentials import Credentials, CredentialsError
from manifests.local_files import state_of
from manifests.redact import redact, secrets_of, split_secret
from stages.base import (
    Context,
    Failed,
    Outcome,
    Resources,
    Row,
    Speed,
    Stage,
    StageError,
    StageSettings,
    alive,
)
from stages.guard import Guard
from stages.openers import driver_faults, from_fs, from_http, from_zip
from stages.transfer import Limits, Open, TransferError, store

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_DRIVERS = {"s3": ("s3fs", "s3"), "gs": ("gcsfs", "gcs"), "gcs": ("gcsfs", "gcs")}


class DownloadSettings(StageSettings):
    # What may be fetched decides who fails, never what a file is: after a change of these,
    # `--retry-failed` tries those that were refused, and nothing is fetched twice.
    max_bytes: Speed[int] = Field(4 << 30, ge=1, description="a larger remote file is a failure")
    schemes: Speed[tuple[str, ...]] = Field(
        ("file", "http", "https", "s3", "gs", "hf", "memory"), description="URLs that may be used"
    )
    allow_outside: Speed[bool] = Field(
        False,
        description="relative paths may leave the table's folder by `..`, a remote table may name "
        "local files, and URLs may lead to this machine and its network's own services",
    )
    redirects: Speed[int] = Field(5, ge=0, description="that a URL may lead through")
    connections: Speed[int] = Field(16, ge=1, le=256, description="files at once, of one worker")
    timeout: Speed[float] = Field(60.0, gt=0, description="seconds without a byte")
    retries: Speed[int] = Field(5, ge=0, description="further tries after a fault that may pass")
    backoff: Speed[float] = Field(1.0, ge=0, description="seconds before the second try; doubles")


@dataclass(frozen=True)
class Place:
    """Where a URI points: a local path or a URL, and a member where it is a zip file."""

    path: str
    member: str | None = None

    @property
    def scheme(self) -> str:
        found = _SCHEME.match(self.path)
        return found[1].lower() if found else "file"


def locate(uri: str, root: str, settings: DownloadSettings) -> Place:
    """The place of a URI of the table; `root` is what relative ones are relative to.

    `zip://inner.mp4::archive.zip` names a member of an archive anywhere; `archive.zip/inner.mp4`
    does so too, except over HTTP, where it is a path like any other. Raises TransferError.
    """
    chained = re.fullmatch(r"zip://(.+?)::(.+)", uri)
    if chained:
        return Place(_absolute(chained[2], root, settings), chained[1].lstrip("/"))
    path = _absolute(uri, root, settings)
    scheme = Place(path).scheme
    if scheme not in ("http", "https") and not (scheme == "file" and _mode(path)):
        for found in re.finditer(r"\.zip/", path, re.IGNORECASE):
            archive, member = path[: found.end() - 1], path[found.end() :]
            if member and (scheme != "file" or stat.S_ISREG(_mode(archive))):
                return Place(archive, member)
    return Place(path)


def _absolute(uri: str, root: str, settings: DownloadSettings) -> str:
    """A local path without its scheme, or a URL. Raises TransferError for what is not allowed."""
    found = _SCHEME.match(uri)
    remote_root = _SCHEME.match(root) is not None
    if found and found[1].lower() == "file":
        uri = uri[found.end() :].removeprefix("localhost")
        uri = uri if _mode(uri) else unquote(uri)
    elif found:
        _allowed(found[1].lower(), settings)
        try:
            urlsplit(uri)
        except ValueError as error:
            raise TransferError("bad_url", f"no URL that can be asked for: {error}") from error
        return uri
    if Path(uri).is_absolute():
        if remote_root and not settings.allow_outside:
            raise TransferError(
                "outside_root",
                f"{uri} is a local path in a table that is not local: set download.allow_outside",
            )
    else:
        if Path(os.path.normpath(uri)).parts[:1] == ("..",) and not settings.allow_outside:
            raise TransferError(
                "outside_root", f"{uri} leaves the table's folder: set download.allow_outside"
            )
        uri = f"{root.rstrip('/')}/{uri}" if remote_root else str(Path(root, uri))
    _allowed(Place(uri).scheme, settings)
    return uri if _SCHEME.match(uri) else str(Path(uri).absolute())


def _allowed(scheme: str, settings: DownloadSettings) -> None:
    if scheme not in settings.schemes:
        known = ", ".join(settings.schemes)
        raise TransferError("bad_scheme", f"{scheme}:// is not one of download.schemes ({known})")


def _mode(path: str) -> int:
    """The file's mode; 0 where there is none, or none that can be seen."""
    try:
        return Path(path).stat().st_mode
    except (OSError, ValueError):
        return 0


def use_local(path: str) -> Row:
    """A local file's columns: its absolute path, sha256 and size. Raises TransferError."""
    try:
        info = Path(path).stat()
        if not stat.S_ISREG(info.st_mode):
            kind = "a folder" if stat.S_ISDIR(info.st_mode) else "no regular file"
            raise TransferError("not_a_file", f"{path} is {kind}")
        if info.st_size == 0:
            raise TransferError("empty_file", f"{path} has 0 bytes")
        content = _sha256(path, info.st_size, info.st_mtime_ns)
        if state_of(Path(path).stat()) != state_of(info):
            raise TransferError("source_changed", f"{path} was changed while it was being hashed")
    except PermissionError as error:
        raise TransferError("permission", f"{path} may not be read") from error
    except (FileNotFoundError, NotADirectoryError, ValueError) as error:
        raise TransferError("missing_file", f"there is no file {path}") from error
    except OSError as error:
        raise TransferError("unreadable", f"{path} can't be read: {error.strerror}") from error
    return {"path": path, "content": content, "bytes": info.st_size, "state": state_of(info)}


@functools.lru_cache(maxsize=65536)
def _sha256(path: str, size: int, mtime_ns: int) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def suffix_of(place: Place) -> str:
    """The ending that the stored file gets: decoders look at it. Empty where there is none."""
    scheme = place.scheme
    path = unquote(urlsplit(place.path).path) if scheme in ("http", "https") else place.path
    suffix = PurePosixPath(place.member or path).suffix.lower()
    return suffix if re.fullmatch(r"\.[a-z0-9]{1,8}", suffix) else ""


class Download(Stage[DownloadSettings, None]):
    """`path`: absolute for local files, else relative to the workdir. `content`: sha256. `state`
    tells the file from a later one in its place: a local one by size and time, a remote one by a
    hash of its ETag or time."""

    name = "download"
    version = 2
    Settings = DownloadSettings
    reads = ("uri", "version")
    adds = pa.schema(
        [
            pa.field("path", pa.string()),
            pa.field("content", pa.string()),
            pa.field("bytes", pa.int64()),
            pa.field("state", pa.string()),
        ]
    )
    default_batch = 256
    default_resources = Resources(cpus=1)
    transient = (
        *("network", "timeout", "unreadable", "remote_error"),
        *("http_408", "http_425", "http_429", "http_5??"),
    )

    def __init__(self, settings: DownloadSettings, context: Context) -> None:
        super().__init__(settings, context)
        s = settings
        self._guard = Guard(context.root, s.schemes, s.allow_outside)
        self._limits = Limits(s.max_bytes, s.timeout, s.retries, s.backoff)

    def identity(self) -> dict[str, Any]:
        return {**super().identity(), "root": split_secret(self.context.root)[0]}

    def check(self) -> None:
        scheme = Place(self.context.root).scheme
        if scheme == "file":
            return
        module, extra = _DRIVERS.get(scheme, ("", ""))
        if module and importlib.util.find_spec(module) is None:
            raise StageError(
                f"the videos lie on {scheme}:// and {module} is not installed: "
                f"pip install 'vidpipe[{extra}]'"
            )
        self._media()

    def _media(self) -> Path:
        if _SCHEME.match(self.context.workdir):
            raise StageError(
                f"workdir {redact(self.context.workdir)} is remote, and files that are brought in "
                "must lie on a local or shared disk: name such a workdir, or local videos"
            )
        return Path(self.context.workdir) / "media"

    def process(self, rows: list[Row], model: None = None) -> Sequence[Outcome]:
        try:
            # What the table says of a URI that lets one in stands in no manifest.
            whole = Credentials(self.context.workdir).whole(row["uri"] or "" for row in rows)
        except CredentialsError as error:
            raise StageError(str(error)) from error
        uris = [whole.get(uri := row["uri"] or "", uri) for row in rows]
        found = self._fetch(dict.fromkeys(uris))
        # A server may quote any secret that it was told.
        told = {
            secret for uri in (*whole.values(), self.context.root) for secret in secrets_of(uri)
        }
        return [_without(found[uri], told) for uri in uris]

    def _fetch(self, uris: Iterable[str]) -> dict[str, Outcome]:
        outcomes: dict[str, Outcome] = {}
        singles: list[tuple[str, Place]] = []
        archives: dict[str, list[tuple[str, Place]]] = {}
        for uri in uris:
            try:
                place = locate(uri, self.context.root, self.settings)
            except TransferError as error:
                outcomes[uri] = _failed(uri, error)
                continue
            if place.member is None:
                singles.append((uri, place))
            else:
                archives.setdefault(place.path, []).append((uri, place))
        if archives or any(place.scheme != "file" for _, place in singles):
            self._media()
        jobs = [
            *(functools.partial(self._single, uri, place) for uri, place in singles),
            *(functools.partial(self._members, *job) for job in archives.items()),
        ]
        pool = ThreadPoolExecutor(self.settings.connections)
        try:
            for found in pool.map(lambda job: job(), jobs):
                outcomes |= found
        finally:
            # After a fault or an interrupt, what has not begun never does.
            pool.shutdown(cancel_futures=True)
        return outcomes

    def _single(self, uri: str, place: Place) -> dict[str, Outcome]:
        if place.scheme == "file":
            return {uri: _attempt(uri, lambda: use_local(place.path))}
        return {uri: _attempt(uri, lambda: self._bring(place, _public(place), self._opener(place)))}

    def _opener(self, place: Place) -> Open:
        fs, path = _filesystem(place.path, self._guard, self.settings.redirects)
        if place.scheme in ("http", "https"):
            return from_http(fs, place.path, self.settings.timeout, self.settings.redirects)
        return from_fs(fs, path)

    def _members(self, path: str, jobs: Sequence[tuple[str, Place]]) -> dict[str, Outcome]:
        """Members of one archive, which is opened once."""
        with ExitStack() as stack:
            try:
                archive, version = self._open_zip(path, stack)
            except TransferError as error:
                return {uri: _failed(uri, error) for uri, _ in jobs}
            return {
                uri: _attempt(uri, functools.partial(self._member, place, archive, version))
                for uri, place in jobs
            }

    def _open_zip(self, path: str, stack: ExitStack) -> tuple[zipfile.ZipFile, str]:
        """The archive, and what tells this version of a local one from another."""
        with driver_faults():
            if Place(path).scheme == "file":
                info = Path(path).stat()
                archive = stack.enter_context(zipfile.ZipFile(path))
                return archive, f"|{state_of(info)}"
            fs, inner = _filesystem(path, self._guard, self.settings.redirects)
            file = stack.enter_context(fs.open(inner, "rb"))
            if not file.seekable():
                raise TransferError("bad_archive", "the server serves no ranges, so no member")
            return stack.enter_context(zipfile.ZipFile(file)), ""

    def _member(self, place: Place, archive: zipfile.ZipFile, version: str) -> Row:
        member = place.member or ""
        address = f"zip://{member}::{_public(place)}{version}"
        return self._bring(place, address, from_zip(archive, member))

    def _bring(self, place: Place, address: str, open_at: Open) -> Row:
        stored = store(self._media(), address, suffix_of(place), open_at, self._limits)
        state = stored.tag or None
        return {
            "path": stored.path,
            "content": stored.content,
            "bytes": stored.bytes,
            "state": state,
        }


# Kept here: fsspec itself would keep some of them one per thread.
@functools.cache
def _http(guard: Guard, redirects: int) -> Any:
    import fsspec

    session = {"trust_env": True, "trace_configs": [guard.trace()]}
    return fsspec.filesystem(
        "http", client_kwargs=session, max_redirects=redirects + 1, skip_instance_cache=True
    )


@functools.cache
def _filesystem_of(scheme: str) -> Any:
    import fsspec

    return fsspec.filesystem(scheme)


def _filesystem(url: str, guard: Guard, redirects: int) -> tuple[Any, str]:
    scheme = Place(url).scheme
    with driver_faults():
        try:
            web = scheme in ("http", "https")
            fs = _http(guard, redirects) if web else _filesystem_of(scheme)
        except ImportError as error:
            module, extra = _DRIVERS.get(scheme, ("", ""))
            remedy = f"{module} is not installed: pip install 'vidpipe[{extra}]'"
            raise TransferError("missing_package", remedy if module else str(error)) from error
        return fs, str(fs._strip_protocol(url))


def _public(place: Place) -> str:
    """The path or URL by which a file that was brought is known: another signature is no other."""
    return split_secret(place.path)[0]


def _attempt(uri: str, bring: Callable[[], Row]) -> Outcome:
    try:
        return bring()
    except TransferError as error:
        return _failed(uri, error)
    finally:
        alive()


def _without(outcome: Outcome, secrets: Collection[str]) -> Outcome:
    if not isinstance(outcome, Failed):
        return outcome
    return Failed(outcome.error, redact(outcome.message, secrets))


def _failed(uri: str, error: TransferError) -> Failed:
    message = str(error)
    if error.error in ("http_401", "http_403") and split_secret(uri)[1] is None:
        message += (
            " (asked without credentials; where the table's URLs hold them, they are kept on the "
            "machine that scanned it: docs/security.md)"
        )
    shown = redact(split_secret(uri)[0])
    return Failed(error.error, message if shown in message else f"{shown}: {message}")
