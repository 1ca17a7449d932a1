"""Commands that keep a workdir sound. Thin shells, like those of `pipeline.cli`."""

from __future__ import annotations

import json
import time
from dataclasses import asdict

import click

from pipeline.commands.options import duration, load, with_config

PROGRESS_SECONDS = 5.0


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
    from pipeline.output import text_table
    from pipeline.upkeep.garbage import UNUSED, collect

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
    if rows:
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


@click.command()
@click.argument("stages", nargs=-1, metavar="[STAGE]...")
@with_config
@click.option("--quick", is_flag=True, help="Only whether files are there, and how long they are.")
@click.option(
    "--repair", is_flag=True, help="Have the next run make anew what hangs on damaged files."
)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def verify(
    stages: tuple[str, ...],
    file: str,
    overrides: tuple[str, ...],
    quick: bool,
    repair: bool,
    as_json: bool,
) -> None:
    """Read again what the commits of STAGEs (default: all) name: is it there, byte for byte?

    Names damaged files on stdout and exits with 1. Sound files are never touched.
    """
    from manifests.faults import size
    from pipeline.output import text_table
    from pipeline.upkeep.repair import repair as mend
    from pipeline.upkeep.verify import Seen
    from pipeline.upkeep.verify import verify as examine

    last = [time.monotonic()]
    total = Seen()

    def progress(stage: str, seen: Seen) -> None:
        total.files, total.bytes = seen.files, seen.bytes
        if time.monotonic() - last[0] > PROGRESS_SECONDS:
            last[0] = time.monotonic()
            click.echo(f"{stage}: {seen.files} files, {size(seen.bytes)} read", err=True)

    pipeline = load(file, overrides)
    damages = list(examine(pipeline, stages, quick, progress))
    if as_json:
        click.echo(json.dumps([damage.to_json() for damage in damages], indent=1))
    elif damages:
        rows = [[d.stage, d.unit, d.kind, d.file, d.finding] for d in damages]
        click.echo(text_table(["stage", "unit", "what", "file", "finding"], rows), nl=False)
    looked = f"{total.files} files, {size(total.bytes)} read"
    if not damages:
        click.echo(f"{looked}: all as they were committed", err=True)
        return
    if repair:
        mend(pipeline, damages)
        click.echo(f"{looked}. `vidpipe run` makes anew what hung on {len(damages)}.", err=True)
        return
    click.echo(
        f"{looked}, {len(damages)} damaged: `vidpipe verify --repair`, then `vidpipe run`", err=True
    )
    raise click.exceptions.Exit(1)


@click.command()
@with_config
@click.option("--quick", is_flag=True, help="Leave out the sha256 of every file.")
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def audit(file: str, overrides: tuple[str, ...], quick: bool, as_json: bool) -> None:
    """Prove from the data that every clip is accounted for, once, at every stage.

    One line a stage; exits with 1 and names clips, units or files where it is not so.
    """
    from pipeline.upkeep.across import INDEX
    from pipeline.upkeep.audit import audit as prove
    from pipeline.upkeep.audit import equation

    last = [time.monotonic()]

    def progress(units: int) -> None:
        if time.monotonic() - last[0] > PROGRESS_SECONDS:
            last[0] = time.monotonic()
            click.echo(f"{units} units", err=True)

    result = prove(load(file, overrides), quick, progress)
    if as_json:
        stages = [{"name": name, **asdict(counts)} for name, counts in result.counts.items()]
        findings = [asdict(finding) for finding in result.findings.values()]
        told = {"stages": stages, "indexed": result.indexed, "findings": findings}
        click.echo(json.dumps(told, indent=1, ensure_ascii=False))
    else:
        lines = {name: equation(counts) for name, counts in result.counts.items()}
        if result.indexed is not None:
            lines[INDEX] = f"{result.indexed:,} clips to train on"
        names, texts = (max(map(len, column)) for column in zip(*lines.items()))
        for name, text in lines.items():
            findings_of = result.of(name)
            click.echo(f"{name:<{names}}  {text:<{texts}}  {'WRONG' if findings_of else 'ok'}")
            for finding in findings_of:
                more = f" and {finding.count - len(finding.ids)} more"
                rest = more if finding.count > len(finding.ids) else ""
                click.echo(f"  {finding.what}: {', '.join(finding.ids)}{rest}")
    for note in result.notes:
        click.echo(note, err=True)
    if result.findings:
        raise click.exceptions.Exit(1)
