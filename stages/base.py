"""What a stage is: frozen settings, the columns it reads and adds, and `process`.

A stage knows no engine and no files of the manifest: rows come in, outcomes go out, one for
one. `pipeline.unit` feeds it and commits what it says; both runners call that. A new stage is one
file here (or anywhere, named `module:Class` in vidpipe.yaml).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar, Generic, TypeVar

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field

from manifests.schema import digest
from stages.media.sampling import Sampling

Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Rejected:
    """The clip is sound and not wanted. `reason`: a word or a rule's name; status counts by it."""

    reason: str
    message: str = ""


@dataclass(frozen=True, slots=True)
class Failed:
    """The clip could not be processed. `error` is the class that status counts by, in words with
    underscores (`not_a_video`); `message` is the sentence for a person."""

    error: str
    message: str = ""


# Failures that speak of the machine or the moment, not of the clip, whatever the stage.
TRANSIENT = ("killed_worker", "time_limit", "out_of_memory", "source_changed")

# A list of rows for a row: the clip was split. Each part bears its own clip_id (`child_id`).
Outcome = Row | Rejected | Failed | list[Row]


class StageError(Exception):
    """A stage cannot be set up as configured: the message says what, why and what to do."""


def _unheard() -> None:
    """Nobody watches this process."""


_listener: Callable[[], None] = _unheard


def alive() -> None:
    """A sign of life out of `process`, from any thread: call it after each row of a long batch.
    Where a stage has a time limit, silence for longer than that ends its worker."""
    _listener()


def on_alive(listener: Callable[[], None]) -> None:
    """Sets who hears `alive` in this process: whoever watches over the worker."""
    global _listener
    _listener = listener


def _untold(text: str) -> None:
    """Nobody reads it."""


_reader: Callable[[str], None] = _untold


def tell(text: str) -> None:
    """Something that a person who watches the run wants to know: a line on the console."""
    _reader(text)


@contextmanager
def telling(reader: Callable[[str], None]) -> Iterator[None]:
    """Sets who hears `tell` within the block."""
    global _reader
    before, _reader = _reader, reader
    try:
        yield
    finally:
        _reader = before


def _unspent(phase: str, seconds: float) -> None:
    """Nobody adds up."""


_spender: Callable[[str, float], None] = _unspent


def spent(phase: str, seconds: float) -> None:
    """Says what some of the time within `stream` went into: `wait`, where its model had nothing to
    do. It stands in the receipt beside what the unit's run measures by itself."""
    _spender(phase, seconds)


@contextmanager
def spending(listener: Callable[[str, float], None]) -> Iterator[None]:
    """Sets who hears `spent` within the block."""
    global _spender
    before, _spender = _spender, listener
    try:
        yield
    finally:
        _spender = before


def _uncounted(what: str, n: int) -> None:
    """Nobody counts."""


_counter: Callable[[str, int], None] = _uncounted


def count(what: str, n: int) -> None:
    """Adds to what the receipt says was made of the unit's rows, or for them: `tokens`."""
    _counter(what, n)


@contextmanager
def counting(listener: Callable[[str, int], None]) -> Iterator[None]:
    """Sets who hears `count` within the block."""
    global _counter
    before, _counter = _counter, listener
    try:
        yield
    finally:
        _counter = before


class _Speed:
    """Marks a setting that changes speed and never results; it stays out of the fingerprint."""


class _Named:
    """Marks a setting that only says where something is found: its content is in the identity."""


SPEED = _Speed()
NAMED = _Named()
T = TypeVar("T")
Speed = Annotated[T, SPEED]
Named = Annotated[T, NAMED]


class StageSettings(BaseModel):
    """Settings of one stage: its section in vidpipe.yaml. Subclasses add their own."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=False)

    enabled: Speed[bool] = Field(True, description="false leaves the stage out of the DAG")
    workers: Speed[int | None] = Field(None, ge=1, description="processes; default: by resources")
    cpus: Speed[float | None] = Field(None, gt=0, description="CPU cores of one worker")
    gpus: Speed[float | None] = Field(None, ge=0, description="GPUs of one worker")
    memory: Speed[int | None] = Field(None, ge=0, description="bytes of one worker")
    batch_size: Speed[int | None] = Field(None, ge=1, description="rows given to process at once")
    time_limit: Speed[float | None] = Field(
        None, gt=0, description="seconds without a sign of life after which a worker is ended"
    )


@dataclass(frozen=True)
class Context:
    """Where a pipeline lives, handed to every stage it builds."""

    workdir: str  # URL or absolute path
    root: str = ""  # what relative URIs of the source are relative to
    sampling: Sampling = field(default_factory=Sampling)
    captions: str = "caption"  # the column of the captions to train on


@dataclass(frozen=True)
class Resources:
    """What one worker of a stage takes. `workers` None: as many as fit."""

    cpus: float = 1.0
    gpus: float = 0.0
    memory: int = 0
    workers: int | None = None


S = TypeVar("S", bound=StageSettings)
Model = TypeVar("Model")


class Stage(ABC, Generic[S, Model]):
    """One step of the DAG. Instances are immutable, cheap to build and picklable.

    `reads`   columns whose values decide the result: they make the row key.
    `carries` columns that process is given but that do not decide the result (where a file lies).
    `adds`    columns it writes. Binary ones are payload: they stay in the shard, out of views.
    `after`   gates: this stage sees only rows that those stages kept, though it reads none of
              their columns. A gate is in no row key.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1  # bump when the same settings give other results
    Settings: ClassVar[type[StageSettings]] = StageSettings
    reads: Sequence[str] = ()
    carries: Sequence[str] = ()
    adds: pa.Schema = pa.schema([])
    after: Sequence[str] = ()
    splits: bool = False  # may answer a row with a list of rows
    # Rows of equal row keys share what is made of them: they go to one worker, of all units.
    once: ClassVar[bool] = False
    on_request: ClassVar[bool] = False  # in the DAG only where vidpipe.yaml has a section for it
    default_batch: ClassVar[int] = 16
    default_resources: ClassVar[Resources] = Resources()
    default_time_limit: ClassVar[float | None] = None  # only for stages that call `alive`
    transient: ClassVar[tuple[str, ...]] = ()  # failures that may pass by themselves: `http_5*`

    def __init__(self, settings: S, context: Context) -> None:
        self.settings = settings
        self.context = context

    @abstractmethod
    def process(self, rows: list[Row], model: Model) -> Sequence[Outcome]:
        """One outcome per row, in order. An exception fails the unit, so expected faults of a row
        are returned as `Failed`, never raised."""

    def process_table(self, table: pa.Table, model: Model) -> Sequence[Outcome] | pa.Table:
        """As `process`, of a batch as an Arrow table. A stage whose work is cheap beside making
        Python rows may override it, and answer with a table as long as the batch: the columns that
        it adds and, unless it keeps every row, `outcome`, `reason` and `message`."""
        return self.process(table.to_pylist(), model)

    def stream(
        self, batches: Iterator[pa.Table], model: Model
    ) -> Generator[tuple[int, Sequence[Outcome] | pa.Table]]:
        """Answers batches, each by its number (from 0) in the order in which they come.

        A stage that gets rows ready while its model works overrides this: it may take some batches
        further before it answers one, and answer in another order. Taken and not answered, rows are
        in flight: a death of the worker is blamed on them, and they are computed again. `batches`
        is to be asked in the thread that this runs in.
        """
        for number, batch in enumerate(batches):
            yield number, self.process_table(batch, model)

    def setup(self) -> Model:
        """Loads what `process` needs, once per worker. Raises StageError with a remedy."""
        return None  # type: ignore[return-value]

    def teardown(self, model: Model) -> None:
        """Gives back what `setup` took: connections, processes. A worker that is killed does not
        come to it."""

    def bind(self, columns: pa.Schema) -> None:
        """Told, before anything runs, which columns there will be, with their types. Raises
        StageError where the settings name others."""

    def check(self) -> None:
        """Cheap checks before anything runs: model files there, packages installed.
        Raises StageError."""

    def check_here(self) -> None:
        """As `check`, of the machine that the workers are to run on: is the device there?"""

    def identity(self) -> dict[str, Any]:
        """Everything beside the rows that decides the results. Override to add to it."""
        return {
            "name": self.name,
            "version": self.version,
            "settings": matters(self.settings),
            "reads": list(self.reads),  # the row keys of other columns compare with none of these
        }

    def metadata(self, model: Model) -> dict[str, Any]:
        """Facts about all rows of a data file, JSON-able, stored once in it."""
        return {}

    def packed(self, rows: pa.Table, made: pa.Table) -> pa.Table:
        """`rows`, which make a data file, as they are stored. Where rows share payload, one of
        `made` may hold it for all: the same rows, and those that somebody else has committed
        meanwhile."""
        return rows

    @property
    def checks(self) -> int:
        """How many rows of a run it is to look at again, to see that they are right."""
        return 0

    def check_rows(self, number: int, rows: int, model: Model) -> None:
        """Told before rows come: so many of the next `rows` are to be looked at again."""

    def cost(self, amounts: Mapping[str, float]) -> float | None:
        """What these amounts, as it counts them, cost in money; None where nobody says a price."""
        return None

    def worth_retry(self, error: str) -> bool:
        """Whether a row that failed so may come through with nothing changed; others are final
        until somebody mends the file, the setting or the rights."""
        return any(fnmatchcase(error, known) for known in (*TRANSIENT, *self.transient))

    @property
    def fingerprint(self) -> str:
        return digest(self.identity())

    @property
    def batch_size(self) -> int:
        return self.settings.batch_size or self.default_batch

    @property
    def time_limit(self) -> float | None:
        """Seconds that `process` may go on without `alive`; None: as long as it takes."""
        return self.settings.time_limit or self.default_time_limit

    @property
    def resources(self) -> Resources:
        default, own = self.default_resources, self.settings
        return Resources(
            cpus=default.cpus if own.cpus is None else own.cpus,
            gpus=default.gpus if own.gpus is None else own.gpus,
            memory=default.memory if own.memory is None else own.memory,
            workers=own.workers or default.workers,
        )

    @property
    def accelerated(self) -> bool:
        """Whether a worker takes a GPU by default, where there is one."""
        return False

    @property
    def loads_model(self) -> bool:
        """Whether a worker keeps something alive between units."""
        return type(self).setup is not Stage.setup


class RowStage(Stage[S, Model]):
    """A stage that takes rows one by one, further ones before it has answered the first: what has
    a model that is kept busy overrides `answers` in place of `process`."""

    @abstractmethod
    def answers(self, rows: Iterable[Row], model: Model) -> Generator[tuple[int, Outcome]]:
        """The outcomes of rows by their numbers (from 0), in any order. See `Stage.stream`."""

    @property
    def batch_size(self) -> int:
        """Rows taken at once: one, as the stage makes its model's batches itself."""
        return 1

    def process(self, rows: list[Row], model: Model) -> Sequence[Outcome]:
        outcomes = dict(self.answers(rows, model))
        return [outcomes[number] for number in range(len(rows))]

    def stream(
        self, batches: Iterator[pa.Table], model: Model
    ) -> Generator[tuple[int, Sequence[Outcome]]]:
        rows = (batch.to_pylist()[0] for batch in batches)
        with closing(self.answers(rows, model)) as outcomes:
            for number, outcome in outcomes:
                yield number, [outcome]


def matters(settings: BaseModel) -> dict[str, Any]:
    """The settings that change results, as JSON-able values."""
    fields = type(settings).model_fields
    apart = {n for n, field in fields.items() if SPEED in field.metadata or NAMED in field.metadata}
    values = settings.model_dump(mode="json", exclude=apart)
    for name, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise StageError(f"{name} is {value}: a setting must be a finite number")
    return values
