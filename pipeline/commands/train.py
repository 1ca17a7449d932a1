"""`vidpipe train` and `sample`. Thin shells, like those of `pipeline.cli`."""

from __future__ import annotations

import click

from pipeline.commands.options import load, with_config


@click.command()
@with_config
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    metavar="N",
    help="After which the run ends, those of before among them; default: train.steps.",
)
@click.option("--output", metavar="DIR", help="Checkpoints and logs; default: WORKDIR/train.")
@click.option("--gpus", type=click.IntRange(min=1), metavar="N", help="Of each node; default: all.")
@click.option(
    "--processes",
    type=click.IntRange(min=1),
    metavar="N",
    help="Of each node, without GPUs; default: 1.",
)
@click.option(
    "--nodes",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Machines, with --launcher slurm or print.",
)
@click.option(
    "--launcher",
    type=click.Choice(["local", "slurm", "print"]),
    default="local",
    show_default=True,
    help="local: here and now; slurm: print a batch script; print: what to run on each node.",
)
@click.option("--submit", is_flag=True, help="With --launcher slurm: hand the script to sbatch.")
@click.option(
    "--sbatch", multiple=True, metavar="OPTION", help="For the script: --sbatch=--partition=gpu."
)
@click.option("--head", metavar="HOST[:PORT]", help="With --launcher print: the first node.")
@click.option(
    "--accelerate",
    metavar="NAME|FILE",
    help="Spreads weights: fsdp2, zero2, zero3, or a configuration of accelerate.",
)
def train(
    file: str,
    overrides: tuple[str, ...],
    steps: int | None,
    output: str | None,
    gpus: int | None,
    processes: int | None,
    nodes: int,
    launcher: str,
    submit: bool,
    sbatch: tuple[str, ...],
    head: str | None,
    accelerate: str | None,
) -> None:
    """Train on the latents and captions that are ready, from the last checkpoint on."""
    from pipeline import launching, training
    from pipeline.config import ConfigError

    if launcher == "local" and nodes > 1:
        raise ConfigError(
            f"--nodes {nodes} are more than this machine: --launcher slurm writes a batch script, "
            "--launcher print says what to run on each"
        )
    if (submit or sbatch) and launcher != "slurm":
        raise ConfigError("--submit and --sbatch go with --launcher slurm")
    if head is not None and launcher != "print":
        raise ConfigError(
            "--head goes with --launcher print: Slurm's first node is the one it gives"
        )
    fleet = launching.fleet(gpus, processes, nodes, accelerate, head, here=launcher == "local")
    settings = training.prepare(load(file, overrides), steps, output)
    words = (launching.TRAINER, "--config", str(settings.resolve()))
    code = 0
    if launcher == "local":
        code = launching.call(fleet.command(*words), fleet.environment)
    elif launcher == "print":
        click.echo(launching.by_hand(fleet, *words), nl=False)
    else:
        script = settings.with_name("slurm.sh")
        folder = settings.parent.resolve()
        script.write_text(launching.slurm_script(fleet, folder, sbatch, *words))
        click.echo(script.read_text() if not submit else str(script))
        code = launching.submit(script) if submit else 0
    if code:
        raise click.exceptions.Exit(code)


@click.command()
@with_config
@click.option("--prompt", "prompts", multiple=True, metavar="TEXT", help="May be repeated.")
@click.option("--prompts-file", metavar="FILE", help="Prompts, one a line.")
@click.option("--out", required=True, metavar="FILE", help="A .gif, .mp4 or .png.")
@click.option("--checkpoint", metavar="DIR", help="Default: the last one of WORKDIR/train.")
@click.option("--num", type=click.IntRange(min=1), metavar="N", help="Videos of each; default: 1.")
@click.option("--seed", type=int, metavar="N", help="Of the first's noise; default: 0.")
@click.option("--steps", type=click.IntRange(min=1), metavar="N", help="Model calls; default: 30.")
@click.option("--guidance", type=float, metavar="X", help="Default: 3; 1: none.")
@click.option("--shift", type=float, metavar="X", help="Of flow's times; default: the training's.")
def sample(
    file: str,
    overrides: tuple[str, ...],
    prompts: tuple[str, ...],
    prompts_file: str | None,
    out: str,
    checkpoint: str | None,
    **sampling: float | None,
) -> None:
    """Make videos of prompts with a trained model."""
    from pipeline.config import ConfigError
    from pipeline.training import sample as launch

    if not prompts and prompts_file is None:
        raise ConfigError("no prompt: give --prompt TEXT, or --prompts-file FILE")
    given = {"prompts-file": prompts_file, **sampling}
    code = launch(load(file, overrides), list(prompts), out, checkpoint, **given)
    if code:
        raise click.exceptions.Exit(code)
