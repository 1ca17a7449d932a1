"""Commands that look at latents. Thin shells, like those of `pipeline.cli`."""

from __future__ import annotations

from pathlib import Path

import click

from pipeline.commands.options import load, with_config


@click.command()
@click.argument("clips", nargs=-1, metavar="[CLIP_ID]...")
@with_config
@click.option("--out", default="decoded", show_default=True, metavar="DIR", help="For the files.")
@click.option("--png", is_flag=True, help="Some frames as a picture; default: all as an mp4.")
@click.option(
    "--n",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="How many random clips, where none is named.",
)
@click.option("--json", "as_json", is_flag=True, help="For programs.")
def decode(
    clips: tuple[str, ...],
    file: str,
    overrides: tuple[str, ...],
    out: str,
    png: bool,
    n: int,
    as_json: bool,
) -> None:
    """Decode stored latents: each clip beside its source, and how like it is (PSNR).

    CLIP_ID may be the beginning of an id.
    """
    from manifests.redact import shown
    from pipeline.decoded import decode as run
    from pipeline.output import json_text, text_table

    made = list(run(load(file, overrides), clips, Path(out), png, n))
    if as_json:
        click.echo(json_text([each.to_json() for each in made], indent=1))
        return
    rows = [
        [each.clip, "" if each.psnr is None else f"{each.psnr:.1f}", each.file or ""]
        for each in made
    ]
    click.echo(text_table(["clip_id", "PSNR (dB)", "file"], rows), nl=False)
    for each in made:
        if each.message:
            click.echo(shown(f"warning: clip {each.clip}: {each.message}"), err=True)
