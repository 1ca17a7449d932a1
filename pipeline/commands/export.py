"""`vidpipe export`, a thin shell over `pipeline.export`."""

from __future__ import annotations

import time

import click

from pipeline.commands.options import load, with_config

# As in `pipeline.export.TARGETS`, which takes Arrow along: `--help` has no use for it.
NAMES = (
    *("finetrainers", "fastvideo", "musubi", "cogvideox-factory", "cogvideo", "ltx"),
    "diffusion-pipe",
)
PROGRESS_SECONDS = 5.0


@click.command()
@click.argument("out", metavar="OUT")
@with_config
@click.option(
    "--to", "target", type=click.Choice(NAMES), required=True, help="The trainer to export to."
)
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="The first N clips only.")
@click.option("--overwrite", is_flag=True, help="Write every file anew, also those in place.")
@click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16", "float16"]),
    help="Of tensors; default: as they are stored.",
)
@click.option("--copy", is_flag=True, help="Copy videos rather than link them.")
@click.option("--model", metavar="NAME", help="cogvideo: the --model_name that it is started with.")
def export(
    out: str,
    file: str,
    overrides: tuple[str, ...],
    target: str,
    limit: int | None,
    overwrite: bool,
    dtype: str | None,
    copy: bool,
    model: str | None,
) -> None:
    """Write latents, embeddings and captions that are ready into folder OUT, as another trainer's
    cache has them. Nothing is encoded again.

    Run again, it writes what is new or another, and removes what left the index.
    """
    from pipeline.export.base import Options
    from pipeline.export.exporting import export as write
    from pipeline.output import text_table

    last = [time.monotonic()]

    def progress(done: int, clips: int) -> None:
        if time.monotonic() - last[0] > PROGRESS_SECONDS:
            last[0] = time.monotonic()
            click.echo(f"{done} of {clips} clips", err=True)

    options = Options(dtype, copy, model)
    done = write(load(file, overrides), target, out, options, limit, overwrite, progress)
    names = ["for", "clips", "left out", "written", "in place", "removed", "bytes written"]
    left = sum(done.left_out.values())
    row = [done.target, done.clips, left, done.written, done.kept, done.removed, done.bytes]
    click.echo(text_table(names, [row]), nl=False)
    for why, clips in done.left_out.items():
        click.echo(f"{clips} clips were left out: {why}", err=True)
    if limit is not None:
        click.echo("with --limit nothing is removed", err=True)
