"""docs/configuration.md, written from the settings themselves: `python -m pipeline.reference`."""

from __future__ import annotations

import typing
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from manifests.sources import SourceSettings
from pipeline.config import RunSettings
from stages import builtin
from stages.base import NAMED, SPEED, StageSettings
from stages.media.sampling import Sampling

HEAD = """\
# vidpipe.yaml

Written from the code by `python -m pipeline.reference`; a test keeps it so. `vidpipe init` writes a
file to start from. Paths that begin with ./ or ../ are relative to the file. Any setting can be
overridden on the
command line: `--set encode.dtype=bfloat16`.

*changes results*: part of the stage's fingerprint; another value makes other results, kept beside
the old ones. *by content*: names something that is known by what is in it, wherever it lies.
*speed*: never changes a result, so changing it computes nothing again.

Top level: `workdir` (default `./work`; a folder, or any fsspec URL with a conditional put),
`source`, `sampling`, `run`, `train`, `stages`, and one section per stage. The settings of `train`
are the trainer's own: [training.md](training.md).

A stage of your own is a class derived from `stages.base.Stage`, in a module beside vidpipe.yaml or
installed: `stages: {watermark: {use: "my_stages:Watermark", threshold: 0.5}}`.
"""
SECTIONS: dict[str, tuple[type[BaseModel], str]] = {
    "source": (SourceSettings, "Where the clips come from."),
    "sampling": (
        Sampling,
        "Which frames stand for a clip. Part of every stage that looks at them.",
    ),
    "run": (RunSettings, "How work is spread. None of it changes a result."),
}


def main() -> None:
    print(reference(), end="")


def reference() -> str:
    """The whole page."""
    parts = [HEAD]
    for name, (model, about) in SECTIONS.items():
        parts += [f"\n## {name}\n\n{about}\n", _table(model, ())]
    parts += ["\n## every stage\n\nThese are in each stage's section.\n", _table(StageSettings, ())]
    for name, cls in builtin().items():
        first = (cls.__doc__ or "").strip().splitlines()[0]
        parts += [f"\n## {name}\n\n{first}\n", _table(cls.Settings, _common(cls.Settings))]
        for key, field in cls.Settings.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                about = (field.annotation.__doc__ or "").strip().splitlines()[0]
                parts += [f"\n### {name}.{key}\n\n{about}\n", _table(field.annotation, ())]
    return "".join(parts)


def _common(settings: type[StageSettings]) -> set[str]:
    """The settings that mean the same in every stage."""
    every = StageSettings.model_fields
    return {n for n, f in every.items() if settings.model_fields[n].description == f.description}


def _table(model: type[BaseModel], leave_out: typing.Collection[str]) -> str:
    staged = issubclass(model, StageSettings)
    rows = [
        f"| `{name}` | {_type(field)} | {_default(field)} |"
        + (f" {_effect(field)} |" if staged else "")
        + f" {(field.description or '').replace('|', '/')} |"
        for name, field in model.model_fields.items()
        if name not in leave_out
    ]
    if not rows:
        return "\nNo settings of its own.\n"
    kind = " |" if staged else ""
    head = f"\n| setting | type | default |{kind}  |\n|---|---|---|{'---|' if staged else ''}---|\n"
    return head + "\n".join(rows) + "\n"


def _effect(field: FieldInfo) -> str:
    if SPEED in field.metadata:
        return "speed"
    return "by content" if NAMED in field.metadata else "changes results"


def _type(field: FieldInfo) -> str:
    return _type_name(field.annotation).replace("|", "or")


def _type_name(kind: Any) -> str:
    origin = typing.get_origin(kind)
    if origin is typing.Literal:
        return " | ".join(f"`{value}`" for value in typing.get_args(kind))
    if origin is typing.Annotated:
        return _type_name(typing.get_args(kind)[0])
    if kind is type(None):
        return "null"
    if origin in (typing.Union, type(int | str)):
        return " | ".join(_type_name(part) for part in typing.get_args(kind))
    if origin is not None:
        inner = ", ".join(_type_name(p) for p in typing.get_args(kind) if p is not Ellipsis)
        return f"{origin.__name__}[{inner}]"
    return str(getattr(kind, "__name__", kind))


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "*required*"
    value = field.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return "`{}`"
    return "" if value is None else f"`{value}`"


if __name__ == "__main__":
    main()
