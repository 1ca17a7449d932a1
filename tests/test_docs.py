"""The docs say what the code does: settings, columns and commands that exist, all of them."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import click
import pytest
from pydantic import BaseModel

from pipeline import reference
from pipeline.cli import cli
from stages import builtin
from stages.base import Context
from trainer.config import (
    DiTSettings,
    Expect,
    FamilySettings,
    LoraSettings,
    SamplesSettings,
    TextSettings,
    TrainSettings,
    ValidationSettings,
)

DOCS = Path(__file__).parents[1] / "docs"
README = DOCS.parent / "README.md"


def test_the_page_of_settings_is_the_code() -> None:
    page = (DOCS / "configuration.md").read_text()
    assert page == reference.reference(), (
        "run: python -m pipeline.reference > docs/configuration.md"
    )


@pytest.mark.parametrize(
    "model",
    [
        *(TrainSettings, DiTSettings, FamilySettings, LoraSettings, TextSettings, Expect),
        *(ValidationSettings, SamplesSettings),
    ],
)
def test_every_training_setting_is_explained(model: type[BaseModel]) -> None:
    page = (DOCS / "training.md").read_text()
    missing = [
        name
        for name, field in model.model_fields.items()
        if f"| `{name}` |" not in page or (field.description or "?") not in page
    ]
    assert not [name for name in missing if name != "index"]


def test_every_column_is_explained(tmp_path: Path) -> None:
    page = (DOCS / "stages.md").read_text()
    context = Context(str(tmp_path))
    for cls in builtin().values():
        for column in cls(cls.Settings(), context).adds:
            if column.name != "latents":
                assert f"`{column.name}`" in page, f"{column.name} of {cls.name}"


def commands(page: Path) -> list[list[str]]:
    """Every `vidpipe ...` that stands in code, as words."""
    text = page.read_text()
    inline = re.findall(r"`(vidpipe [^`\n]+)`", text)
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    shown = [line.split("#")[0] for line in lines if line.startswith("vidpipe ")]
    return [shlex.split(command)[1:] for command in (*inline, *shown)]


@pytest.mark.parametrize("page", [README, *sorted(DOCS.glob("*.md"))], ids=lambda p: p.name)
def test_commands_in_the_docs_exist_with_these_options(page: Path) -> None:
    for words in commands(page):
        if words and words[0].islower() and not words[0].startswith("-"):
            command = cli.commands.get(words[0])
            assert command is not None, f"vidpipe {' '.join(words)}"
            if isinstance(command, click.Group) and len(words) > 1:
                command = command.commands.get(words[1])
                assert command is not None, f"vidpipe {' '.join(words)}"
            known = {o for p in command.params if isinstance(p, click.Option) for o in p.opts}
            used = {w.split("=")[0] for w in words if w.startswith("-")}
            assert used <= known | {"--help", "-h"}, f"vidpipe {' '.join(words)}"


def every_command() -> dict[str, click.Command]:
    """Those of groups by two words."""
    found: dict[str, click.Command] = {}
    for name, command in cli.commands.items():
        inner = command.commands if isinstance(command, click.Group) else {}
        found |= {name: command, **{f"{name} {n}": c for n, c in inner.items()}}
    return found


@pytest.mark.parametrize("name", sorted(every_command()))
def test_every_command_and_option_has_help_and_is_in_the_readme(name: str) -> None:
    command = every_command()[name]
    assert command.help
    for parameter in command.params:
        if isinstance(parameter, click.Option) and parameter.name not in ("prompts",):
            assert parameter.help or parameter.name in ("clips",), parameter.name
    assert f"vidpipe {name}" in README.read_text()
