"""Captions made up by hand, good ones and ones with a planted fault: what the checks must tell
apart. The first part was written before the checks were, the second one after them, the third after
they were mended on the second."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

FILES = [Path(__file__).with_name(f"planted-{part}.txt") for part in (1, 2, 3)]


@dataclass(frozen=True)
class Planted:
    part: int
    fault: str  # the flag that must be found; good: none may be
    truncated: bool  # as the engine says
    original: str
    answer: str


def planted() -> list[Planted]:
    found = []
    for part, file in enumerate(FILES, 1):
        for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else ():
            if line.startswith("#"):
                continue
            fault, original, answer = (part.strip() for part in line.split("|", 2))
            text = answer.replace("\\n", "\n")
            found.append(Planted(part, fault.lstrip("+"), fault.startswith("+"), original, text))
    return found
