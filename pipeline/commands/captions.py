"""Commands that look at captions. Thin shells, like those of `pipeline.cli`."""

from __future__ import annotations

import json
import time
from pathlib import Path

import click

from pipeline.commands.options import load, with_config

PROGRESS_SECONDS = 5.0
_WIDTH = 90  # characters of a caption on the console


@click.group()
def captions() -> None:
    """Look at the captions of a corpus as a whole, and compare prompts and models."""


@captions.command()
@click.argument("a")
@click.argument("b")
@with_config
@click.option(
    "--n",
    "n",
    type=click.IntRange(min=1),
    default=20,
    show_default=True,
    metavar="N",
    help="How many clips.",
)
@click.option(
    "--stage",
    type=click.Choice(["recaption", "describe"]),
    help="Whose captions; default: that whose captions are trained on.",
)
@click.option("--seed", default=0, show_default=True, help="Another one draws other clips.")
@click.option(
    "--out",
    default="compare.html",
    show_default=True,
    metavar="FILE",
    help="The page; written over.",
)
def compare(
    a: str,
    b: str,
    file: str,
    overrides: tuple[str, ...],
    n: int,
    stage: str | None,
    seed: int,
    out: str,
) -> None:
    """Write a page with what two prompts or models make of the same clips, beside their frames.

    A and B are each: the name of a preset; a .yaml file with settings that take the place of those
    in the stage's section; any other file, which is a prompt; or `current`, the configuration as it
    is. The workdir stays as it is: nothing of this is kept but the page.
    """
    from pipeline.compare import compare as run_both
    from pipeline.compare import sample, shown, side
    from pipeline.compare_page import page
    from stages.base import telling

    last = [0.0]

    def progress(what: str, always: bool) -> None:
        if always or time.monotonic() - last[0] > PROGRESS_SECONDS:
            last[0] = time.monotonic()
            click.echo(what, err=True)

    sides = [side(file, overrides, named, stage) for named in (a, b)]
    rows = sample(sides[0], sides[1], n, seed)
    if len(rows) < n:
        click.echo(f"only {len(rows)} clips have come to {sides[0].stage.name} so far", err=True)
    with telling(lambda what: click.echo(what, err=True)):
        told = run_both(sides, rows, progress)
    path = Path(out)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page(told, [shown(sides[0], row) for row in rows]), encoding="utf-8")
    click.echo(path)


@captions.command()
@with_config
@click.option("--column", metavar="NAME", help="Of captions; default: those to train on.")
@click.option(
    "--top",
    type=click.IntRange(min=0),
    default=10,
    show_default=True,
    metavar="N",
    help="How many of the captions that stand on most clips.",
)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def check(
    file: str, overrides: tuple[str, ...], column: str | None, top: int, as_json: bool
) -> None:
    """Count the flags of the captions that were written, and show those that many clips share.

    Captions are the same that differ in case and punctuation alone.
    """
    from pipeline.account import spent
    from pipeline.captions import check as look
    from pipeline.output import text_table

    last = [time.monotonic()]

    def progress(clips: int) -> None:
        if time.monotonic() - last[0] > PROGRESS_SECONDS:
            last[0] = time.monotonic()
            click.echo(f"{clips} captions", err=True)

    found = look(load(file, overrides), column, top, progress)
    if as_json:
        click.echo(json.dumps(found.to_json(), indent=1, ensure_ascii=False))
        return
    again = sum(n for attempts, n in found.attempts.items() if attempts > 1)
    lines: list[tuple[str, int]] = [
        (f"clips with {found.column}", found.clips),
        ("captions that differ", found.distinct),
        ("clips whose caption others have too", found.shared),
        *((f"written by: {source}", n) for source, n in found.sources.most_common()),
        *([("asked more than once", again)] if found.attempts else []),
        *((f"flag {flag}", n) for flag, n in found.flags.most_common()),
        *((f"rejected as {reason}", n) for reason, n in found.rejected.most_common()),
    ]
    width = max(len(name) for name, _ in lines)
    for name, n in lines:
        share = f"{n / found.clips:6.1%}" if found.clips else ""
        click.echo(f"{name:<{width}}  {n:>10,}  {share}")
    if line := spent(found.column, found.amounts, found.cost):
        click.echo(line)
    if found.repeated:
        rows = [[r.clips, r.text[:_WIDTH], r.examples[0]] for r in found.repeated]
        click.echo()
        click.echo(text_table(["clips", "caption", "one of them"], rows), nl=False)
