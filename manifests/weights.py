"""Which model a folder holds: the sha256 over what decides its results."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

# Configuration, weights, vocabulary and chat template.
PARTS = {".json", ".safetensors", ".bin", ".pt", ".pth", ".model", ".txt", ".jinja"}


def file_sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def folder_sha256(folder: Path, of_file: Callable[[Path], str] = file_sha256) -> str:
    """The sha256 over the names and contents of a model folder's files."""
    total = hashlib.sha256()
    for file in sorted(folder.iterdir()):
        if file.suffix in PARTS and file.is_file():
            total.update(f"{file.name}\0{of_file(file)}\n".encode())
    return total.hexdigest()
