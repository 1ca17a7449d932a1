"""The command line. Commands are thin shells over library calls; imports stay lazy, because
`vidpipe --help` must not pay for torch.

Exit codes: 0 done (failed rows are data), 1 the run itself failed, 2 usage or configuration,
130, 143 or 129 stopped by Ctrl-C, SIGTERM or SIGHUP.
"""

from __future__ import annotations

import pipeline.workers.early  # isort: skip  # noqa: F401  signals, before what takes time

import io
import logging
import os
import sys
import traceback
from typing import TYPE_CHECKING

import click

from pipeline.commands.captions import captions
from pipeline.commands.estimate import estimate
from pipeline.commands.export import export
from pipeline.commands.latents import decode
from pipeline.commands.options import F, load, with_config
from pipeline.commands.train import sample, train
from pipeline.commands.upkeep import audit, gc, verify
from pipeline.workers import stop

if TYPE_CHECKING:
    from pipeline.dag import Pipeline
    from pipeline.unit import Retry


def main() -> None:
    """The `vidpipe` command."""
    stop.listen()
    try:
        code = cli.main(standalone_mode=False)
    except click.exceptions.Exit as error:
        code = error.exit_code
    except click.ClickException as error:
        said = io.StringIO()
        error.show(said)
        click.echo(_shown(said.getvalue()), err=True, nl=False)
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        code = _stop()
    except Exception as error:  # noqa: BLE001  the last one to see it
        known = _known(error)
        if known != 1 and stop.early():
            code = _stop()
        else:
            text = traceback.format_exc() if known is None else f"vidpipe: {error}"
            click.echo(_shown(text), err=True)
            code = 1 if known is None else known
    _leave(int(code or 0))


def _stop() -> int:
    """Says who asked and ends what this process started; the exit code."""
    click.echo(stop.sentence(), err=True)
    stop.sweep()
    return stop.code()


def _shown(text: str) -> str:
    from manifests.redact import shown  # takes pyarrow along, which `--help` has no use for

    return shown(text)


def _leave(code: int) -> None:
    """Ends the process without tearing down what torch, Arrow and FFmpeg left running: now and
    then a native thread outlives its owner, and a run that went well would end in an abort."""
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _known(error: Exception) -> int | None:
    """The exit code of an error whose message is all that a user needs; None: a bug of ours."""
    from manifests.shards import ShardError
    from manifests.sources import SourceError
    from manifests.store import StoreError
    from pipeline.config import ConfigError
    from pipeline.errors import RunError
    from stages.base import StageError

    if isinstance(error, ConfigError | SourceError | StageError):
        return 2
    if isinstance(error, StoreError | ShardError | RunError | OSError):
        return 1
    return None


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="vidpipe", prog_name="vidpipe")
def cli() -> None:
    """From a table of videos to latent shards to a trained video model.

    Every clip is accounted for; nothing is computed twice; the GPU never waits.

    \b
    Start:   vidpipe demo            the whole way on 48 made clips, in two minutes
             vidpipe init            a vidpipe.yaml for your own videos
             vidpipe run             whatever is pending
             vidpipe status          where every clip is
    """
    from manifests.redact import redact_logs

    redact_logs()  # before a command, and not for `--help`


for command in (captions, decode, estimate, export, train, sample, verify, audit, gc):
    cli.add_command(command)


@cli.command()
@click.argument("folder", default=".", metavar="[DIR]")
@click.option("--videos", metavar="PATH", help="Your folder or table of videos.")
def init(folder: str, videos: str | None) -> None:
    """Write a commented vidpipe.yaml into DIR."""
    from pipeline.scaffold import init as write

    path = write(folder, videos)
    click.echo(f"wrote {path}. Edit `source`, then: vidpipe plan -c {path}", err=True)


def _run_options(command: F) -> F:
    for option in reversed(
        (
            click.option(
                "--gpus",
                type=click.IntRange(min=0),
                metavar="N",
                help="GPUs to use; default: all there are.",
            ),
            click.option(
                "--runner",
                type=click.Choice(["ray", "local"]),
                help="ray (default), or a loop in this process.",
            ),
            click.option("--address", metavar="A", help="A running Ray cluster, e.g. auto."),
            click.option(
                "--retry-failed",
                is_flag=False,
                flag_value="*",
                metavar="[CLASS]",
                help="Try failed rows again: those that may pass as things are, those of CLASS "
                "(several: A,B), or all.",
            ),
        )
    ):
        command = option(command)
    return command


@cli.command()
@click.argument("stages", nargs=-1, metavar="[STAGE]...")
@with_config
@_run_options
def plan(
    stages: tuple[str, ...],
    file: str,
    overrides: tuple[str, ...],
    gpus: int | None,
    runner: str | None,
    address: str | None,
    retry_failed: str | None,
) -> None:
    """Show what `vidpipe run` would do, and why. Takes in new rows of the source; runs nothing."""
    from pipeline.output import text_table
    from pipeline.report import console
    from pipeline.run import prepare

    pipeline = load(file, overrides, gpus=gpus, runner=runner, address=address)
    _, _, todo = prepare(pipeline, *_asked(pipeline, stages, retry_failed), console())
    rows = [[s.name, s.counts.total, s.todo, len(s.units), s.why] for s in todo.stages.values()]
    click.echo(text_table(["stage", "in", "to do", "units", "why"], rows), nl=False)
    if todo.empty:
        click.echo("nothing to do", err=True)


@cli.command()
@click.argument("stages", nargs=-1, metavar="[STAGE]...")
@with_config
@_run_options
@click.option("--explain", is_flag=True, help="Say how stages are spread over workers, and why.")
def run(
    stages: tuple[str, ...],
    file: str,
    overrides: tuple[str, ...],
    gpus: int | None,
    runner: str | None,
    address: str | None,
    retry_failed: str | None,
    explain: bool,
) -> None:
    """Bring STAGEs (default: all) and what they need up to date.

    Only what is pending runs; a second run right after the first does nothing.
    """
    from pipeline.account import summary
    from pipeline.report import console
    from pipeline.run import run as run_pipeline

    pipeline = load(file, overrides, gpus=gpus, runner=runner, address=address)
    report = console()
    result = run_pipeline(pipeline, *_asked(pipeline, stages, retry_failed), report, explain)
    if not result.ran:
        report.note(f"nothing to do: {_up_to_date(result.stages)}")
    for line in summary(pipeline, result.status, result.stages):
        report.note(line)
    if result.faults:
        first = result.faults[0]
        report.note(
            f"{len(result.faults)} units raised; the first: stage {first.stage}, unit "
            f"{first.unit}: {first.error}\n{first.trace or ''}"
            "Their rows are pending: mend the cause and run again."
        )
        raise click.exceptions.Exit(1)


def _up_to_date(stages: list[str]) -> str:
    return f"{', '.join(stages)} {'is' if len(stages) == 1 else 'are'} up to date"


def _asked(
    pipeline: Pipeline, stages: tuple[str, ...], classes: str | None
) -> tuple[tuple[str, ...], Retry]:
    """The stages and what to retry; `*` is the option without a value. In `--retry-failed encode`
    the word is a stage: click takes the next word for the option's value."""
    from pipeline.unit import Retry

    if classes is None:
        return stages, Retry()
    if classes in pipeline.stages:
        stages, classes = (*stages, classes), "*"
    named = () if classes == "*" else (c.strip() for c in classes.split(","))
    return stages, Retry(True, frozenset(named))


@cli.command()
@with_config
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def status(file: str, overrides: tuple[str, ...], as_json: bool) -> None:
    """Where every clip is: per stage in, kept, rejected, failed, pending."""
    from pipeline.account import account, retry_hint, spent
    from pipeline.index import of_another_source
    from pipeline.output import json_text, text_table

    pipeline = load(file, overrides)
    result = account(pipeline)
    if told := of_another_source(pipeline):
        click.echo(_shown(f"note: {told}: `vidpipe run` reads that"), err=True)
    if as_json:
        click.echo(json_text(result, indent=1))
        return

    rows = [
        [
            s["name"],
            s["state"],
            s["in"],
            s["kept"],
            sum(s["rejected"].values()),
            sum(s["failed"].values()),
            s["pending"],
            ", ".join(f"{n} {why}" for why, n in {**s["rejected"], **s["failed"]}.items()),
        ]
        for s in result["stages"]
    ]
    names = ["stage", "state", "in", "kept", "rejected", "failed", "pending", "reasons"]
    click.echo(text_table(names, rows), nl=False)
    for stage in result["stages"]:
        if line := spent(stage["name"], stage["amounts"], stage["cost"]):
            click.echo(line)
    for line in retry_hint(sum(s["worth_retry"] for s in result["stages"])):
        click.echo(line, err=True)


@cli.command()
@click.argument("stage")
@with_config
@click.option("--where", metavar="SQL", help='Only rows for which this holds: "len < 64".')
@click.option("--columns", metavar="A,B", help="Only these columns.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["table", "json", "jsonl", "csv"]),
    help="Default: table on a terminal, jsonl elsewhere.",
)
@click.option("--limit", type=click.IntRange(min=0), metavar="N", help="At most N rows.")
def show(
    stage: str,
    file: str,
    overrides: tuple[str, ...],
    where: str | None,
    columns: str | None,
    form: str | None,
    limit: int | None,
) -> None:
    """Print the joined view after STAGE: one row per clip of the source, latents left out.

    `outcome` is kept, rejected, failed or pending, `stage` the stage that gave it.
    """
    from pipeline.output import emit
    from pipeline.query import select

    form = form or ("table" if sys.stdout.isatty() else "jsonl")
    names = [c.strip() for c in columns.split(",")] if columns else []
    if not names and form == "table":
        names = ["clip_id", "uri", "outcome", "reason", "stage", "message"]
    emit(select(load(file, overrides), stage, where, names, limit), form, sys.stdout)


@cli.command()
@with_config
@click.option("--out", required=True, metavar="FILE", help="A .parquet or .jsonl file.")
def manifest(file: str, overrides: tuple[str, ...], out: str) -> None:
    """Write the whole joined view, one row per clip of the source, to a file."""
    from pipeline.query import write

    rows = write(load(file, overrides), out)
    click.echo(f"{out}: {rows} rows", err=True)


@cli.command()
@with_config
def doctor(file: str, overrides: tuple[str, ...]) -> None:
    """Check this machine and, where there is one, the configuration."""
    from manifests.redact import shown
    from pipeline.doctor import examine

    ok = True
    for check in examine(file, overrides):
        ok = ok and check.ok
        line = f"{'ok  ' if check.ok else 'FAIL'}  {check.subject:<16} {check.finding}"
        click.echo(shown(line))
    if not ok:
        raise click.exceptions.Exit(1)


@cli.command()
@click.argument("folder", default="vidpipe-demo", metavar="[DIR]")
@click.option("--clips", type=click.IntRange(min=16), default=48, show_default=True)
def demo(folder: str, clips: int) -> None:
    """The main job on made clips: videos, captions, latents, training, one sampled GIF."""
    from pipeline.demo import demo as play

    code = play(folder, clips)
    if code:
        raise click.exceptions.Exit(code)


if __name__ == "__main__":
    main()
