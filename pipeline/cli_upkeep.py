"""Commands that keep a workdir sound. Thin shells, like those of `pipeline.cli`."""

from __future__ import annotations

import json

import click

from pipeline.cli_options import duration, load, with_config


@click.command()
@with_config
@click.option("--delete", is_flag=True, help="Remove what is listed; without it nothing is.")
@click.option(
    "--fingerprints",
    is_flag=True,
    help="With --delete: also results of settings that this configuration does not use.",
)
@click.option(
    "--grace",
    type=duration,
    default="24h",
    show_default=True,
    metavar="TIME",
    help="Nothing younger is touched: 30m, 24h, 7d.",
)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def gc(
    file: str,
    overrides: tuple[str, ...],
    delete: bool,
    fingerprints: bool,
    grace: float,
    as_json: bool,
) -> None:
    """List what the workdir no longer needs: leftovers of crashes, commits that a snapshot holds,
    downloads that no clip refers to, results of settings not in use. Removes it with --delete.

    Training's output and files that vidpipe did not name are never touched.
    """
    from manifests.faults import size
    from pipeline.garbage import UNUSED, collect
    from pipeline.output import text_table

    found = collect(load(file, overrides), grace, delete, fingerprints)
    if as_json:
        click.echo(json.dumps([group.to_json() for group in found], indent=1))
        return
    rows = [
        [
            group.kind,
            (group.log or "").replace("/", " "),
            group.files,
            size(group.bytes),
            "removed" if group.removed else "",
        ]
        for group in found
    ]
    click.echo(text_table(["what", "of", "files", "size", ""], rows), nl=False)
    kept = [group for group in found if not group.removed]
    if not found:
        click.echo("nothing to remove", err=True)
    elif not delete:
        click.echo("nothing was removed: --delete does it", err=True)
    elif any(group.kind == UNUSED for group in kept):
        click.echo(
            "results of settings not in use are kept: another configuration may use them "
            "(--delete --fingerprints removes them)",
            err=True,
        )
