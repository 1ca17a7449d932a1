"""Options that commands share."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import click

from pipeline.workers import stop

if TYPE_CHECKING:
    from pipeline.dag import Pipeline

F = TypeVar("F", bound=Callable[..., Any])


def with_config(command: F) -> F:
    """-c and --set, which every command with a pipeline takes."""
    command = click.option(
        "--set",
        "overrides",
        multiple=True,
        metavar="KEY=VALUE",
        help="Override a setting: --set encode.dtype=bfloat16. May be given several times.",
    )(command)
    return click.option(
        "-c",
        "--config",
        "file",
        default="vidpipe.yaml",
        show_default=True,
        metavar="FILE",
        help="The configuration.",
    )(command)


def load(file: str, overrides: tuple[str, ...], **run: Any) -> Pipeline:
    from pipeline import config, dag

    loaded = config.load(file, overrides)
    stop.heed()
    chosen = {name: value for name, value in run.items() if value is not None}
    return dag.build(replace(loaded, run=loaded.run.model_copy(update=chosen)))


def duration(text: str) -> float:
    """Seconds, out of `90s`, `30m`, `24h` or `7d`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if found is None:
        raise click.BadParameter(f"{text!r}: a number and s, m, h or d is expected: 30m, 24h, 7d")
    return float(found[1]) * {"s": 1, "m": 60, "h": 3600, "d": 86400}[found[2]]
