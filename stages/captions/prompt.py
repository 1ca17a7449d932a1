"""What a model is asked: a template over columns, and what kind of answer it asks for.

The presets are the text files of `stages/prompts/`: a few lines `key: value`, an empty line, the
template. Whoever changes a template gives it another version; results hang on the text itself.
"""

from __future__ import annotations

import json
import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from manifests.schema import did_you_mean, digest
from stages.base import Rejected, Row, StageError

FOLDER = Path(__file__).parents[1] / "prompts"
DEFAULT = "rewrite"


@dataclass(frozen=True)
class Template:
    """A prompt with columns in braces."""

    text: str
    columns: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Template:
        """Raises StageError for braces that are no plain column names."""
        text = text.strip()
        try:
            parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise StageError(f"the prompt's braces don't match: {error}") from error
        columns = []
        for _, name, spec, conversion in parts:
            if name is None:
                continue
            if not name.isidentifier() or spec or conversion:
                raise StageError(
                    f"the prompt has {{{name}}}: braces hold the name of a column and nothing "
                    "else; write {{ and }} for braces of the text"
                )
            columns.append(name)
        if not columns:
            raise StageError("the prompt names no column: put {caption} where the caption goes")
        return cls(text, tuple(dict.fromkeys(columns)))

    def render(self, row: Row) -> str | Rejected:
        for column in self.columns:
            if row[column] is None or not str(row[column]).strip():
                return Rejected(f"empty_{column}", f"{column} is empty, and the prompt is about it")
        return self.text.format_map({c: str(row[c]).strip() for c in self.columns})


@dataclass(frozen=True)
class Prompt:
    """A template, and what it asks for."""

    template: Template
    name: str | None = None  # of a preset
    version: int = 1
    words: int | None = None  # that it asks for at most
    tokens: int = 1  # that its answer may need
    schema: Mapping[str, Any] | None = None  # JSON schema of the answer; None: plain text
    captions: tuple[str, ...] = ()  # the keys of the answer that are captions
    main: str = ""  # the one of them that is the caption
    parts: tuple[str, ...] = field(default=())  # the other keys

    @property
    def label(self) -> str:
        """For the rows: the template's hash, after the preset's name and version."""
        known = digest(self.template.text)
        return f"{self.name}@{self.version} {known}" if self.name else known

    @property
    def max_words(self) -> int | None:
        """More than this is not what was asked for: models count badly, so half as many again."""
        return None if self.words is None else self.words * 3 // 2


def presets() -> list[str]:
    return sorted(file.stem for file in FOLDER.glob("*.txt"))


def preset(name: str) -> Prompt:
    """Raises StageError for a name that is none."""
    if name not in presets():
        raise StageError(
            f"there is no preset {name}.{did_you_mean(name, presets())} "
            f"There are {', '.join(presets())}."
        )
    head, _, text = (FOLDER / f"{name}.txt").read_text(encoding="utf-8").partition("\n\n")
    told = dict(line.split(": ", 1) for line in head.splitlines())
    schema = json.loads((FOLDER / told["schema"]).read_text()) if "schema" in told else None
    captions = tuple(told.get("captions", "").split())
    return Prompt(
        Template.parse(text),
        told["name"],
        int(told["version"]),
        int(told["words"]) if "words" in told else None,
        int(told.get("tokens", 1)),
        schema,
        captions,
        told.get("main", ""),
        tuple(key for key in schema["required"] if key not in captions) if schema else (),
    )


def load_prompt(name: str | None, text: str | None, file: str | None) -> Prompt:
    """The prompt of the settings: one of a preset, a text or a file; else the default preset.
    Raises StageError."""
    if text is not None:
        return Prompt(Template.parse(text))
    if file is None:
        return preset(name or DEFAULT)
    try:
        return Prompt(Template.parse(Path(file).read_text(encoding="utf-8")))
    except (OSError, UnicodeDecodeError) as error:
        raise StageError(f"prompt_file {file} can't be read: {error}") from error
