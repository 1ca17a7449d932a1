"""`vidpipe train` and `vidpipe sample`: they hand over to the trainer, a process of its own.

The trainer knows nothing of the pipeline: it gets an index, a folder and its own settings as JSON.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from manifests.faults import unusable
from manifests.log import Counts
from manifests.redact import redacted, shown
from manifests.shards import Index
from pipeline import index
from pipeline.config import ConfigError
from pipeline.dag import Pipeline
from pipeline.launching import Fleet, call
from pipeline.plan import status
from pipeline.report import describe
from stages.embed import Embed
from stages.encode import Encode


def settings(
    pipeline: Pipeline, steps: int | None = None, output: str | None = None
) -> dict[str, Any]:
    """The trainer's settings: the section `train`, and what the pipeline knows."""
    sampling = pipeline.config.sampling
    pace = "interval" if sampling.policy == "interval" else "fps"  # the other has no effect
    expect: dict[str, Any] = {
        "policy": sampling.policy,
        pace: getattr(sampling, pace),
        "buckets": [[shape.frames, shape.height, shape.width] for shape in sampling.shapes],
    }
    if "embed" in pipeline.stages:
        expect["max_length"] = cast(Embed, pipeline.stages["embed"]).settings.max_length
    chosen: dict[str, Any] = {"expect": expect, **pipeline.config.train}
    chosen["index"] = index.path(pipeline)
    default = f"{pipeline.config.workdir}/train"
    named = chosen.get("output")
    chosen["output"] = output or (str(pipeline.config.base / named) if named else default)
    if "://" in chosen["output"]:
        raise ConfigError(
            f"checkpoints can't go to {chosen['output']}: name a local folder with --output"
        )
    if steps is not None:
        chosen["steps"] = steps
    return chosen


def prepare(pipeline: Pipeline, steps: int | None = None, output: str | None = None) -> Path:
    """Brings the index up to date and writes the trainer's settings; returns their file.

    Raises ConfigError where no clip is ready, StoreUnusable where it cannot be written.
    """
    if index.refresh(pipeline) == 0 or not pipeline.store.exists(index.INDEX_NAME):
        raise ConfigError(_nothing_ready(pipeline))
    chosen = settings(pipeline, steps, output)
    name_models(pipeline, chosen)
    folder = Path(chosen["output"])
    file = folder / "settings.json"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(redacted(chosen), indent=1))
    except OSError as error:
        raise unusable(error, "write", str(file)) from error
    clips = Index.open(chosen["index"]).table.num_rows
    print(shown(f"training on {clips} clips, output in {folder}"), file=sys.stderr)
    if waiting := _pending(pipeline, status(pipeline)):
        told = f"note: not trained on are rows that wait: {waiting}. `vidpipe run` brings them in"
        print(told, file=sys.stderr)
    return file


def name_models(pipeline: Pipeline, chosen: dict[str, Any]) -> None:
    """Names what samples while training need: the VAE, and the text encoder of stored embeddings.
    They are fetched first if they have to be."""
    match chosen.get("samples"):
        case {"prompts": prompts, **others} if prompts:
            needed = {"vae": cast(Encode, pipeline.stages["encode"]).folder()}
            if "embed" in pipeline.stages:
                encoder, tokenizer = cast(Embed, pipeline.stages["embed"]).folders()
                needed |= {"text_encoder": encoder, "tokenizer": tokenizer}
            chosen["samples"] = {**needed, "prompts": prompts, **others}


def sample(
    pipeline: Pipeline,
    prompts: list[str],
    out: str,
    checkpoint: str | None = None,
    **options: str | float | None,
) -> int:
    """Samples `prompts` with a checkpoint (default: the last one) to a GIF, mp4 or PNG. `options`
    are those of `trainer.sample`; None: as it has them."""
    folder = cast(Encode, pipeline.stages["encode"]).folder()
    place = checkpoint or settings(pipeline)["output"]
    named = [part for prompt in prompts for part in ("--prompt", prompt)]
    if "embed" in pipeline.stages:
        encoder, tokenizer = cast(Embed, pipeline.stages["embed"]).folders()
        named += ["--text-encoder", encoder, "--tokenizer", tokenizer]
    named += [f"--{name}={value}" for name, value in options.items() if value is not None]
    words = ("trainer.sample", "--checkpoint", place, "--vae", folder, "--out", out, *named)
    return call(Fleet().command(*words))


def _pending(pipeline: Pipeline, totals: Mapping[str, Counts]) -> str:
    """What waits at the stages that clips have to pass to be trained on."""
    waiting = {n: totals[n].pending for n in pipeline.upstream(index.needed(pipeline))}
    return ", ".join(f"{n} at {name}" for name, n in waiting.items() if n)


def _nothing_ready(pipeline: Pipeline) -> str:
    totals = status(pipeline)
    needed = index.needed(pipeline)
    lines = [
        f"{name}: {describe(totals[name])}, {totals[name].pending} pending"
        for name in pipeline.upstream(needed)
        if name in needed or totals[name].pending
    ]
    advice = "`vidpipe run` first; `vidpipe status` tells why clips were lost"
    if totals["encode"].kept and "empty_caption" in totals.get("recaption", Counts()).rejected:
        advice = (
            "clips that have no caption to rewrite are trained on without one by "
            "`--set recaption.enabled=false`"
        )
    culprit = next((n for n in pipeline.upstream(needed) if not totals[n].kept), None)
    lost = f": {culprit} leaves none, {_lost(totals[culprit])}" if culprit else ""
    stays = ". The index of before stays" * pipeline.store.exists(index.INDEX_NAME)
    return f"no clip is ready to train on{lost} ({'; '.join(lines)}): {advice}{stays}"


def _lost(counts: Counts) -> str:
    """`5 rejected (bright 3, length 2), 1 failed (corrupt 1), 4 pending`"""
    told = [f"{counts.pending} pending"] * bool(counts.pending)
    for what, reasons in (("failed", counts.failed), ("rejected", counts.rejected)):
        if reasons:
            most = sorted(reasons.items(), key=lambda item: -item[1])
            named = ", ".join(f"{reason} {n}" for reason, n in most)
            told.insert(0, f"{sum(reasons.values())} {what} ({named})")
    return ", ".join(told) or "as none reaches it"
