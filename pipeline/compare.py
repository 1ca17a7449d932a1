"""`vidpipe captions compare`: two prompts or models on the same clips, before a week of GPUs.

A side is the name of a preset, a file with a prompt, or a YAML file with settings that overlay
those of vidpipe.yaml; nothing is stored. The page: `pipeline.compare_page`.
"""

from __future__ import annotations

import heapq
import json
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, cast

import yaml

from manifests.schema import digest
from manifests.view import UnitView
from pipeline import config, dag
from pipeline.config import CAPTIONED, ConfigError
from pipeline.dag import Pipeline
from pipeline.plan import views
from stages.base import Outcome, Rejected, Row, counting
from stages.captions.captioner import Captioner
from stages.captions.prompt import presets
from stages.engines.base import (
    Engine,
    Pictures,
    Prepared,
    Requests,
    Result,
    SamplingSettings,
)
from stages.engines.choice import EngineSettings
from stages.files import CARRIED, clip_file
from stages.media.frames import Unsuited
from stages.media.picture import Pixels
from stages.media.spread import FramesSettings, spread
from stages.media.video import VideoError

AS_IS = "current"
THUMBNAILS = FramesSettings(count=4, side=192)
Progress = Callable[[str, bool], None]  # a line, and whether it is one that is always said
_PROMPTS = ("preset", "prompt", "prompt_file")
_MERGED = ("quality", "frames")  # sections within a stage's section
_ASKING = ("max_tokens", "temperature", "top_p", "seed")  # of a request, not of the engine


@dataclass(frozen=True)
class Side:
    """One of the two: as it was named, and the stage made of it."""

    name: str
    pipeline: Pipeline
    stage: Captioner[Any]


@dataclass
class Written:
    """What one side made of one clip."""

    outcome: Outcome
    seconds: float  # from question to answer, all tries together


@dataclass
class Told:
    """One side, done."""

    name: str
    model: str
    prompt: str
    column: str
    written: list[Written] = field(default_factory=list)
    amounts: Counter[str] = field(default_factory=Counter)  # tokens, prompt_tokens, asked_again
    starting: float = 0.0  # seconds
    seconds: float = 0.0  # starting apart

    def kept(self) -> list[Row]:
        return [each.outcome for each in self.written if isinstance(each.outcome, dict)]

    def flagged(self) -> int:
        """Clips whose last answer has a flag, or was refused for one."""
        kept = sum(bool(row[f"{self.column}_flags"]) for row in self.kept())
        lost = [each.outcome for each in self.written if isinstance(each.outcome, Rejected)]
        return kept + sum(one.reason.startswith("caption_") for one in lost)


@dataclass(frozen=True)
class Shown:
    """A clip of the comparison: its row, and a few frames or why there are none."""

    row: Row
    frames: Pixels | None
    fault: str = ""


def side(file: str, overrides: Sequence[str], named: str, stage: str | None) -> Side:
    """The side that `named` stands for: AS_IS, a preset, a prompt's file or a YAML file. `stage`:
    of captions; None: the one whose captions are trained on. Raises ConfigError."""
    stage = stage or captioned(dag.build(config.load(file, overrides)))
    changes = [f"{stage}.enabled=true", *(f"{stage}.{c}" for c in _changes(named))]
    try:
        pipeline = dag.build(config.load(file, [*overrides, *changes]))
        pipeline.bind([stage])
    except ConfigError as error:
        raise ConfigError(f"{named}: {error}") from error
    return Side(named, pipeline, cast("Captioner[Any]", pipeline.stages[stage]))


def captioned(pipeline: Pipeline) -> str:
    """The stage whose captions are trained on. Raises ConfigError where there is none."""
    found = next((stage for stage in CAPTIONED if stage in pipeline.stages), None)
    if found is None:
        raise ConfigError(
            "no stage writes captions here: name one, --stage recaption or --stage describe"
        )
    return found


def _changes(named: str) -> Iterator[str]:
    """What a side changes in its stage's section: `setting=value`, the value in JSON."""
    if named == AS_IS:
        return
    path = Path(named).expanduser()
    if named in presets():
        overlay: dict[str, Any] = {"preset": named}
    elif path.suffix in (".yaml", ".yml"):
        overlay = _overlay(path)
    elif path.is_file():
        overlay = {"prompt_file": str(path.resolve())}
    else:
        raise ConfigError(
            f"{named} is no preset ({', '.join(presets())}), not `{AS_IS}`, and no file: name a "
            "file with a prompt, or a .yaml with settings of the stage"
        )
    if any(name in overlay for name in _PROMPTS):
        overlay = dict.fromkeys(_PROMPTS) | overlay  # one takes the place of another
    for name, value in overlay.items():
        inner = value.items() if name in _MERGED and isinstance(value, dict) else ()
        yield from (f"{name}.{key}={json.dumps(each)}" for key, each in inner)
        if not inner:
            yield f"{name}={json.dumps(value)}"


def _overlay(path: Path) -> dict[str, Any]:
    """Raises ConfigError."""
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
        found = {} if found is None else found
        if not isinstance(found, dict) or not all(isinstance(name, str) for name in found):
            raise ConfigError(f"{path}: a mapping of the stage's settings is expected")
        json.dumps(found)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} can't be read: {error}") from error
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path}: no plain YAML: {error}") from error
    return {name: config.from_file(value, path.resolve().parent) for name, value in found.items()}


def sample(a: Side, b: Side, n: int, seed: int = 0) -> list[Row]:
    """`n` clips that both may be asked about, drawn by their ids: the same for the same seed.
    Raises ConfigError where there is none yet."""
    columns = dict.fromkeys(("caption", "start", "end", "content", *CARRIED))
    for one in (a, b):
        columns |= dict.fromkeys((*one.stage.reads, *one.stage.carries))
    drawn: list[tuple[str, str, Row]] = []
    for view, other in zip(views(a.pipeline), views(b.pipeline), strict=True):
        mine, theirs = _rows(view, a, columns), _rows(other, b, columns)
        both = [(digest([seed, clip]), clip) for clip in mine.keys() & theirs.keys()]
        least = heapq.nsmallest(n, both)
        known = [(order, clip, theirs[clip] | _filled(mine[clip])) for order, clip in least]
        drawn = heapq.nsmallest(n, drawn + known, key=lambda one: one[:2])
    if not drawn:
        both_need = (one.pipeline.dag.layers[one.stage.name].needs for one in (a, b))
        needs = dict.fromkeys(chain.from_iterable(both_need))
        raise ConfigError(
            f"no clip has come to {a.stage.name} yet: `vidpipe run {' '.join(needs)}` first"
        )
    return [row for _, _, row in drawn]


def _rows(view: UnitView, one: Side, columns: Mapping[str, None]) -> dict[str, Row]:
    rows = view.reached(one.stage.name)
    table = view.inputs(one.stage.name, rows, list(columns))
    return {row["clip_id"]: row for row in table.to_pylist()}


def _filled(row: Row) -> Row:
    return {name: value for name, value in row.items() if value is not None}


def compare(sides: Sequence[Side], rows: Sequence[Row], progress: Progress) -> list[Told]:
    """Both, one after the other, each with its engine, or one that suits both. Raises
    StageError."""
    told: list[Told] = []
    engine: Engine | None = None
    try:
        for number, one in enumerate(sides):
            began = time.perf_counter()
            if engine is None:
                progress(f"{one.name}: starting {one.stage.settings.model}", True)
                engine = one.stage.setup()
            starting = time.perf_counter() - began
            told.append(_told(one, engine, rows, starting, progress))
            if sides[number + 1 :] and _engine(sides[number + 1].stage) != _engine(one.stage):
                one.stage.teardown(engine)
                engine = None
    finally:
        if engine is not None:
            engine.close()
    return told


def _engine(stage: Captioner[Any]) -> dict[str, Any]:
    """What stages must have in common to share an engine."""
    settings = stage.settings
    names = [name for name in EngineSettings.model_fields if name not in _ASKING]
    seen = getattr(settings, "frames", None)
    media = (seen.form, seen.count) if seen else None
    return {"class": type(stage), "media": media} | {n: getattr(settings, n) for n in names}


def _told(
    one: Side,
    engine: Engine,
    rows: Sequence[Row],
    starting: float,
    progress: Progress,
) -> Told:
    stage = one.stage
    told = Told(one.name, engine.label, stage.prompt.label, stage.column, starting=starting)
    watched = Watched(engine)
    found: dict[int, Outcome] = {}
    began = time.perf_counter()
    count = lambda what, n: told.amounts.update({what: n})  # noqa: E731
    with counting(count), closing(stage.answers(list(rows), watched)) as answers:
        for number, outcome in answers:
            found[number] = outcome
            progress(f"{one.name}: {len(found)} of {len(rows)} clips", len(found) == len(rows))
    told.seconds = time.perf_counter() - began
    told.written = [Written(found[n], watched.seconds[n]) for n in range(len(rows))]
    return told


class Watched:
    """An engine with a stop-watch: seconds from question to answer, by the row's number."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.label = engine.label
        self.seconds: defaultdict[int, float] = defaultdict(float)

    def stream(
        self, requests: Requests, sampling: SamplingSettings
    ) -> Generator[tuple[int, Result]]:
        def noted() -> Requests:
            for one in requests:
                if one is not None:
                    self.seconds[one[0]] -= time.perf_counter()
                yield one

        with closing(self._engine.stream(noted(), sampling)) as answers:
            for number, result in answers:
                self.seconds[number] += time.perf_counter()
                yield number, result

    def prepared(self, pictures: Pictures) -> Prepared:
        return self._engine.prepared(pictures)

    def close(self) -> None:
        """The engine is another's."""


def shown(one: Side, row: Row) -> Shown:
    """The clip's frames, small."""
    context = one.stage.context
    if not row["path"]:
        return Shown(row, None, "no file was downloaded")
    try:
        with clip_file(row, context) as path:
            made = spread(
                path, THUMBNAILS, context.sampling, row["start"], row["end"], clip=row["clip_id"]
            )
    except (VideoError, Unsuited) as error:
        return Shown(row, None, str(error))
    return Shown(row, made.frames)
