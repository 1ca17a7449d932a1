"""What the stages that have captions written share: the question, its answers, their account.

`recaption` asks about text, `describe` about frames. An answer that fails its checks is asked for
again; what becomes of it: `stages.captions.verdict`.
"""

from __future__ import annotations

import functools
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypeVar

import pyarrow as pa
from pydantic import Field, model_validator

from manifests.schema import did_you_mean, digest
from stages.base import (
    Failed,
    Outcome,
    Resources,
    Row,
    RowStage,
    StageError,
    alive,
    count,
    spent,
)
from stages.captions.prompt import Prompt, Template, load_prompt
from stages.captions.quality import QualitySettings
from stages.captions.verdict import judge, seed_of, settle
from stages.engines.base import (
    Answer,
    Engine,
    EngineFailure,
    Prepared,
    Request,
    Result,
    SamplingSettings,
)
from stages.engines.choice import (
    EngineSettings,
    args_of,
    check_engine,
    check_engine_here,
    model_of,
    open_engine,
)

UNASKED = 64  # rows without a question that are held back while no answer is awaited


class CaptionSettings(EngineSettings):
    """What is asked, how, and what an answer must be."""

    sees: ClassVar[bool] = False  # whether frames go with the prompt
    prompt: str | None = Field(
        None,
        description="template; {column} is filled in, {{ is a brace; a line with {column?} is left "
        "out where that is empty",
    )
    prompt_file: str | None = Field(None, description="file of the template")
    preset: str | None = Field(
        None, description="a prompt of ours, by its name; default: rewrite, without the two above"
    )
    quality: QualitySettings = Field(
        default_factory=QualitySettings, description="what a caption must be: see below"
    )

    def load(self) -> Prompt:
        """Raises StageError."""
        return load_prompt(self.preset, self.prompt, self.prompt_file, sees=self.sees)

    @model_validator(mode="after")
    def _asks(self) -> CaptionSettings:
        named = [n for n in ("preset", "prompt", "prompt_file") if getattr(self, n) is not None]
        if len(named) > 1:
            raise ValueError(f"{' and '.join(named)} are both set: keep one")
        try:
            prompt = self.load()
        except StageError as error:
            raise ValueError(str(error)) from error
        if self.max_tokens < prompt.tokens:
            raise ValueError(
                f"max_tokens is {self.max_tokens}: preset {prompt.name} asks for an answer that "
                f"may need {prompt.tokens}"
            )
        return self


@dataclass(frozen=True, slots=True)
class Question:
    """A row as it is put to the model."""

    row: Row
    prompt: str
    seen: Prepared | None = None  # the frames that go with it, as the engine takes them
    also: Row | None = None  # further columns of its outcome
    attempt: int = 1

    @property
    def nbytes(self) -> int:
        return 0 if self.seen is None else self.seen.nbytes


C = TypeVar("C", bound=CaptionSettings)


class Captioner(RowStage[C, Engine]):
    """Has captions written by a model. Its columns: `column`, and others that begin so."""

    column: ClassVar[str]
    transient: ClassVar[tuple[str, ...]] = (
        *("engine_unreachable", "network", "timeout", "bad_answer", "killed_engine"),
        *("http_408", "http_409", "http_425", "http_429", "http_5??"),
    )
    default_resources = Resources(cpus=1)
    holds: int | None = None  # bytes of frames that the engine may hold; None: as many as come

    @functools.cached_property
    def prompt(self) -> Prompt:
        return self.settings.load()

    @property
    def template(self) -> Template:
        return self.prompt.template

    @property
    def original(self) -> str:
        """The column that captions are compared with and fall back to."""
        return self.settings.quality.original or self.template.original

    @property
    def beside(self) -> tuple[str, ...]:
        """Columns that are read for the checks."""
        return (self.original,) if self.settings.quality.compares or self.prompt.captions else ()

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]
        return tuple(dict.fromkeys((*self.template.columns, *self.template.hints, *self.beside)))

    @property
    def accelerated(self) -> bool:
        return self.settings.takes_gpu

    def bind(self, columns: pa.Schema) -> None:
        asked = {c: f"the prompt has {{{c}}}" for c in self.template.columns}
        asked |= {c: f"the prompt has {{{c}?}}" for c in self.template.hints}
        asked = {c: f"quality.original is {c}" for c in self.beside} | asked
        for column, where in asked.items():
            if column not in columns.names:
                raise StageError(
                    f"{where} and there is no such column.{did_you_mean(column, columns.names)}"
                )

    def cost(self, amounts: Mapping[str, float]) -> float | None:
        price = self.settings.price
        return None if price is None else price.of(amounts)

    def check(self) -> None:
        check_engine(self.settings, self.name)

    def check_here(self) -> None:
        check_engine_here(self.settings)

    def identity(self) -> dict[str, Any]:
        values = super().identity()
        known: dict[str, Any] = dict(values["settings"])
        # The template's text counts, not where it came from; the model's files, not their place.
        for name in ("preset", "prompt", "prompt_file", "model", "revision"):
            del known[name]
        prompt = self.prompt
        known["quality"] = {**known["quality"], "original": self.original}
        known["engine_args"] = args_of(self.settings)
        if self.settings.engine == "vllm" and prompt.schema is not None:
            known["json"] = "compact"  # since vLLM is told to write no blanks between its parts
        return {
            **values,
            "settings": known,
            "model": model_of(self.settings),
            "template": digest(self.template.text),
            "answer": {"max_words": prompt.max_words, "schema": prompt.schema, "main": prompt.main},
        }

    def setup(self) -> Engine:
        return open_engine(self.settings, self.name)

    def teardown(self, model: Engine) -> None:
        model.close()

    def questions(
        self, rows: Iterable[Row], model: Engine
    ) -> Generator[tuple[int, Question | Outcome]]:
        """What is asked of each row, by its number; of some it is clear what becomes of them."""
        for number, row in enumerate(rows):
            prompt = self.template.render(row)
            yield number, Question(row, prompt) if isinstance(prompt, str) else prompt

    def answers(self, rows: Iterable[Row], model: Engine) -> Generator[tuple[int, Outcome]]:
        """The outcomes of rows by their numbers, as the engine answers them."""
        s = self.settings
        sampling = SamplingSettings(s.max_tokens, s.temperature, s.top_p, self.prompt.schema)
        with (
            closing(self.questions(rows, model)) as questions,
            closing(_Asking(self, questions)) as asking,
        ):
            while asking.more:
                with closing(model.stream(asking.requests(), sampling)) as answers:
                    for number, result in answers:
                        alive()
                        outcome = asking.answered(number, self._counted(result), model.label)
                        if outcome is not None:
                            yield number, outcome
                        yield from asking.unasked()
                yield from asking.unasked()

    def _counted(self, result: Result) -> Result:
        """Tells how many tokens went into an answer, as far as its engine says."""
        if isinstance(result, Answer):
            for what in ("tokens", "prompt_tokens", "cached_tokens"):
                count(what, getattr(result, what) or 0)
        return result

    def request(self, question: Question) -> Request:
        """One try at a question, with the clip's own seed for it."""
        s = self.settings
        seed = seed_of(s.seed, question.row["clip_id"], question.attempt)
        heat = max(s.temperature, s.quality.retry_temperature) if question.attempt > 1 else None
        return Request(question.prompt, seed, heat, question.seen)

    def outcome(self, question: Question, result: Result, label: str) -> Outcome | None:
        """What an answer makes of the row; None: it is to be asked again."""
        if isinstance(result, EngineFailure):
            return Failed(result.error, result.message)
        quality = self.settings.quality
        original = question.row.get(self.original)
        made = {
            "raw": result.text,
            "model": label,
            "prompt": self.prompt.label,
            "tokens": result.tokens,
            "prompt_tokens": result.prompt_tokens,
            "truncated": result.truncated,
        }
        verdict = judge(result, self.prompt, quality, original)
        outcome = settle(verdict, quality, question.attempt, original, made, self.column)
        return {**outcome, **(question.also or {})} if isinstance(outcome, dict) else outcome


class _Asking:
    """The questions that are out, and those to be asked again."""

    def __init__(
        self, stage: Captioner[Any], questions: Iterator[tuple[int, Question | Outcome]]
    ) -> None:
        self._stage, self._questions = stage, questions
        self._asked: dict[int, Question] = {}
        self._again: deque[int] = deque()
        self._unasked: deque[tuple[int, Outcome]] = deque()
        self._bytes = 0  # of what is asked
        self.more = True  # whether there may be rows that were not taken yet

    def requests(self) -> Iterator[tuple[int, Request] | None]:
        """For the engine: those to be asked again first, as their frames are held. Ends where many
        rows in a row had no question and nothing is out, so that what became of them is told."""
        most = self._stage.holds
        self.more = False
        while True:
            if self._again:
                number = self._again.popleft()
                yield number, self._stage.request(self._asked[number])
            elif self._asked and most is not None and self._bytes >= most:
                yield None
            elif (one := self._next()) is not None:
                number, question = one
                if isinstance(question, Question):
                    self._asked[number] = question
                    self._bytes += question.nbytes
                    yield number, self._stage.request(question)
                else:
                    self._unasked.append((number, question))
                    if len(self._unasked) >= UNASKED and not self._asked:
                        self.more = True
                        return
            elif self._asked:
                yield None  # an answer that is out may have to be asked for again
            else:
                return

    def _next(self) -> tuple[int, Question | Outcome] | None:
        """The next one; the time for which the engine has nothing to do meanwhile is told."""
        began = time.perf_counter()
        one = next(self._questions, None)
        if not self._asked:
            spent("wait", time.perf_counter() - began)
        return one

    def answered(self, number: int, result: Result, label: str) -> Outcome | None:
        """What becomes of a row; None where it is asked again."""
        question = self._asked[number]
        outcome = self._stage.outcome(question, result, label)
        if outcome is None:
            count("asked_again", 1)
            self._asked[number] = replace(question, attempt=question.attempt + 1)
            self._again.append(number)
            return None
        del self._asked[number]
        self._bytes -= question.nbytes
        if isinstance(outcome, dict) and outcome[f"{self._stage.column}_source"] == "original":
            count("originals", 1)
        return outcome

    def unasked(self) -> Iterator[tuple[int, Outcome]]:
        """The rows that no question was asked about, taken out."""
        while self._unasked:
            yield self._unasked.popleft()

    def close(self) -> None:
        self._asked.clear()
