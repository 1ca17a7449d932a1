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
DEFAULT, DEFAULT_SEEING = "rewrite", "describe-dense"


@dataclass(frozen=True)
class Template:
    """A prompt with columns in braces. `hints` are columns that may be empty, `{caption?}`: a line
    that has one is left out then."""

    text: str
    columns: tuple[str, ...]
    hints: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str, sees: bool = False) -> Template:
        """`sees`: frames go with it, so it need not be about a column. Raises StageError for braces
        that are no plain column names."""
        text = text.strip()
        try:
            parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise StageError(f"the prompt's braces don't match: {error}") from error
        names = []
        for _, name, spec, conversion in parts:
            if name is None:
                continue
            if not name.removesuffix("?").isidentifier() or spec or conversion:
                raise StageError(
                    f"the prompt has {{{name}}}: braces hold the name of a column and nothing "
                    "else, but ? behind one that may be empty; write {{ and }} for braces of the "
                    "text"
                )
            names.append(name)
        columns = tuple(dict.fromkeys(n for n in names if not n.endswith("?")))
        if not columns and not sees:
            raise StageError("the prompt names no column: put {caption} where the caption goes")
        if not text:
            raise StageError("the prompt is empty")
        hints = dict.fromkeys(n[:-1] for n in names if n.endswith("?") and n[:-1] not in columns)
        return cls(text, columns, tuple(hints))

    @property
    def original(self) -> str:
        """The column of captions that it is about."""
        about = "description" in self.columns and "caption" not in self.columns
        return "description" if about else "caption"

    def render(self, row: Row) -> str | Rejected:
        for column in self.columns:
            if _empty(row[column]):
                return Rejected(f"empty_{column}", f"{column} is empty, and the prompt is about it")
        text = self.text
        for hint in self.hints:
            if _empty(row[hint]):
                lines = text.splitlines(keepends=True)
                text = "".join(line for line in lines if f"{{{hint}?}}" not in line)
        values = {c: "" if _empty(row[c]) else str(row[c]).strip() for c in self.asks}
        return text.format_map(values | {f"{c}?": value for c, value in values.items()})

    @property
    def asks(self) -> tuple[str, ...]:
        """All columns that it names."""
        return (*self.columns, *self.hints)


def _empty(value: Any) -> bool:
    return value is None or not str(value).strip()


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
    sees: bool = False  # frames go with it

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
    sees = told.get("sees") == "frames"
    return Prompt(
        Template.parse(text, sees),
        told["name"],
        int(told["version"]),
        int(told["words"]) if "words" in told else None,
        int(told.get("tokens", 1)),
        schema,
        captions,
        told.get("main", ""),
        tuple(key for key in schema["required"] if key not in captions) if schema else (),
        sees,
    )


def load_prompt(name: str | None, text: str | None, file: str | None, sees: bool = False) -> Prompt:
    """The prompt of the settings: one of a preset, a text or a file; else the default preset.
    `sees`: frames go with it. Raises StageError."""
    if text is not None:
        return Prompt(Template.parse(text, sees), sees=sees)
    if file is None:
        found = preset(name or (DEFAULT_SEEING if sees else DEFAULT))
        if found.sees != sees:
            raise StageError(
                f"preset {name} is about {'frames' if found.sees else 'text'}: it is for the stage "
                f"{'describe' if found.sees else 'recaption'}"
            )
        return found
    try:
        return Prompt(Template.parse(Path(file).read_text(encoding="utf-8"), sees), sees=sees)
    except (OSError, UnicodeDecodeError) as error:
        raise StageError(f"prompt_file {file} can't be read: {error}") from error
