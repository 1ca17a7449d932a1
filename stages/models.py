"""Where a model's files lie, and which model exactly they are.

A model is named by one string: `demo://vae` and `demo://captioner` (they ship with vidpipe), a
local folder, or the id of a repository on the Hugging Face hub.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from manifests import hub, weights
from stages.base import StageError
from stages.remember import remembered

DEMO = "demo://"
_DEMO_FOLDER = Path(__file__).parent / "demo"
_COMMIT = re.compile(r"[0-9a-f]{40}")
# Copies of the same weights for other frameworks, of no use here.
_FOREIGN = ["*.h5", "*.msgpack", "*.onnx", "*.gguf", "*.tflite", "*.ot", "onnx/*", "original/*"]


def resolve(spec: str, revision: str | None = None, subfolder: str | None = None) -> str:
    """The local folder of a model, downloaded first where it is on the hub.

    Raises StageError where it is missing or can't be fetched.
    """
    check(spec, subfolder)
    wanted = [f"{subfolder}/*"] if subfolder else None
    folder = _local(spec) or _fetch(spec, revision, wanted, ())
    return str(folder / subfolder if subfolder else folder)


def root(spec: str, revision: str | None = None, without: Sequence[str] = ()) -> Path:
    """The local folder of a model of several parts, whatever is in it; downloaded first where it
    is on the hub, but for the files that match a pattern of `without`. Raises StageError."""
    return _local(spec) or _fetch(spec, revision, None, without)


def check(spec: str, subfolder: str | None = None) -> None:
    """Raises StageError for what is neither a hub id nor a local model. Touches no network."""
    folder = _local(spec)
    if folder is None:
        if not hub.is_id(spec):
            raise StageError(
                f"model {spec!r}: there is no such folder, and a hub id reads owner/name"
            )
        return
    if not folder.is_dir():
        raise StageError(f"model {spec}: there is no folder {folder}. Check the path.")
    place = folder / subfolder if subfolder else folder
    if not any((place / name).is_file() for name in ("config.json", "model_index.json")):
        parts = sorted(p.parent.name for p in place.glob("*/config.json"))
        hint = f" There is one in {', '.join(parts)}: name it as the subfolder." if parts else ""
        raise StageError(f"model {spec}: {place} has no config.json, so it is no model.{hint}")


def model_identity(
    spec: str, revision: str | None = None, subfolder: str | None = None
) -> dict[str, Any]:
    """What tells this model from any other, for fingerprints.

    A local model is its files' sha256, wherever they lie. A hub model is its id and the revision
    as configured: asking the hub which commit `main` is today would make fingerprints depend on
    the network, and a new commit would silently recompute everything. Pin a commit to be exact.
    """
    folder = _local(spec)
    if folder is None:
        return {"id": spec, "revision": revision or "main", "subfolder": subfolder}
    check(spec, subfolder)
    return {"sha256": folder_sha256(folder / subfolder if subfolder else folder)}


def check_weights(module: Any, loading: Mapping[str, Any], folder: str) -> None:
    """Raises StageError where the files of `folder` lack weights of `module`: libraries fill these
    with random numbers. `loading`: what `from_pretrained` says with `output_loading_info`."""
    own = {name for name, _ in module.named_parameters()}
    lacking = sorted(own.intersection(loading["missing_keys"]))
    if lacking:
        some = ", ".join(lacking[:2]) + ", ..." * (len(lacking) > 2)
        raise StageError(
            f"{folder} lacks {len(lacking)} weights of its {type(module).__name__} ({some}): fetch "
            "it anew, or name the folder of the whole model"
        )


def model_label(spec: str, revision: str | None, folder: str) -> str:
    """The model as rows name it: `spec@commit` from the hub, `spec@sha256` otherwise (12 digits).

    `folder` is what `resolve` gave.
    """
    if _local(spec) is not None:
        return f"{spec}@{folder_sha256(Path(folder))[:12]}"
    commit = next((part for part in Path(folder).parts if _COMMIT.fullmatch(part)), None)
    return f"{spec}@{commit[:12] if commit else revision or 'main'}"


def folder_sha256(folder: Path) -> str:
    """The sha256 over the names and contents of a model folder's files."""
    return weights.folder_sha256(folder, _remembered_sha256)


def _remembered_sha256(file: Path) -> str:
    stat = file.stat()
    return _file_sha256(str(file), stat.st_size, stat.st_mtime_ns)


@functools.cache
def _file_sha256(path: str, size: int, mtime_ns: int) -> str:
    # The hub's cache names large files by their sha256: no need to read gigabytes again.
    target = Path(path).resolve()
    if target.parent.name == "blobs" and re.fullmatch(r"[0-9a-f]{64}", target.name):
        return target.name
    key = ["sha256", str(target), size, mtime_ns]
    return str(remembered(key, lambda: weights.file_sha256(target)))


def _local(spec: str) -> Path | None:
    """The folder that `spec` names, there or not; None where it is an id on the hub."""
    if spec.startswith(DEMO):
        return _DEMO_FOLDER / spec.removeprefix(DEMO)
    path = Path(spec).expanduser()
    looks_local = path.is_absolute() or spec.startswith((".", "~")) or spec.count("/") != 1
    return path.absolute() if looks_local or path.exists() else None


def _fetch(
    spec: str, revision: str | None, wanted: Sequence[str] | None, unwanted: Sequence[str]
) -> Path:
    try:
        return hub.fetch(spec, revision, wanted, [*_FOREIGN, *unwanted])
    except hub.HubError as error:
        raise StageError(f"model {error}") from error
