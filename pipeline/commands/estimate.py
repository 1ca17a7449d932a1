"""`vidpipe estimate`. A thin shell, like the commands of `pipeline.cli`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from pipeline.commands.options import load, with_config

if TYPE_CHECKING:
    from pipeline.estimate.estimate import Estimate


@click.command()
@click.argument("stages", nargs=-1, metavar="[STAGE]...")
@with_config
@click.option(
    "--clips",
    type=click.IntRange(min=1),
    default=200,
    show_default=True,
    metavar="N",
    help="Clips to try, drawn at random from all that have work to do.",
)
@click.option(
    "--gpus",
    type=click.IntRange(min=1),
    metavar="N",
    help="Also for N GPUs, with as many cores each as here.",
)
@click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the drawing."
)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def estimate(
    stages: tuple[str, ...],
    file: str,
    overrides: tuple[str, ...],
    clips: int,
    gpus: int | None,
    seed: int,
    as_json: bool,
) -> None:
    """Say what `vidpipe run [STAGE]...` will take: hours, tokens, disk, and which stage bounds it.

    Tries the pending stages on a sample, with the workers' own code, in a temporary folder; the
    workdir is left as it is, and so are the sample's clips: a run computes them again. Exits with 1
    where a stage raised.
    """
    from pipeline.estimate.estimate import estimate as reckon
    from pipeline.estimate.telling import lines, to_json
    from pipeline.output import json_text
    from pipeline.report import console

    report = console()
    found = reckon(load(file, overrides), stages, clips, seed, gpus, report)
    if as_json:
        click.echo(json_text(to_json(found), indent=1))
    elif found.stages:
        click.echo("\n".join(lines(found)))
    if not found.stages:
        report.note(f"nothing to do: {', '.join(found.names)}: up to date")
    for note in found.notes:
        report.note(f"note: {note}")
    _raise(found)


def _raise(found: Estimate) -> None:
    for stage in found.faults:
        if stage.trace:
            click.echo(stage.trace, err=True, nl=False)
    if found.faults:
        raise click.exceptions.Exit(1)
