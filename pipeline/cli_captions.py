"""Commands that look at captions. Thin shells, like those of `pipeline.cli`."""

from __future__ import annotations

import json
import time

import click

from pipeline.cli_options import load, with_config

PROGRESS_SECONDS = 5.0
_WIDTH = 90  # characters of a caption on the console


@click.group()
def captions() -> None:
    """Look at the captions of a corpus as a whole."""


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
