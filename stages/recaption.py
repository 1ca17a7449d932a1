"""recaption: captions rewritten by a language model, the old one and the model on record.

What is read is what the prompt names: `{caption}`, or any other column in braces.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import re
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any, Literal
from urllib.parse import urlsplit

import pyarrow as pa
from pydantic import BaseModel, ConfigDict, Field, model_validator

from manifests.schema import did_you_mean, digest
from stages.base import (
    Failed,
    Outcome,
    Resources,
    Row,
    RowStage,
    Speed,
    StageError,
    StageSettings,
    alive,
    count,
    spent,
)
from stages.captions.prompt import Prompt, Template, load_prompt
from stages.captions.quality import QualitySettings
from stages.captions.verdict import COLUMNS, judge, seed_of, settle
from stages.devices import check_device
from stages.engines.base import Answer, Engine, EngineFailure, Request, Result, SamplingSettings
from stages.models import check, model_identity, model_label, resolve

# Arguments of vllm.LLM that spread or schedule the work and leave the answers as they are.
_SPEED_ARGS = {
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "data_parallel_size",
    "gpu_memory_utilization",
    "max_num_seqs",
    "max_num_batched_tokens",
    "enforce_eager",
    "enable_prefix_caching",
    "swap_space",
    "cpu_offload_gb",
    "disable_log_stats",
    "distributed_executor_backend",
}
_VARIABLE = re.compile(r"[A-Z_][A-Z0-9_]{0,39}")


class PriceSettings(BaseModel):
    """What a server takes for its tokens, in money for a million of them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    input: float = Field(ge=0, description="tokens of prompts")
    output: float = Field(ge=0, description="tokens of answers")
    cached: float | None = Field(
        None, ge=0, description="of the prompts' tokens those that the server had cached"
    )

    def of(self, amounts: Mapping[str, float]) -> float:
        cached = amounts.get("cached_tokens", 0)
        fresh = amounts.get("prompt_tokens", 0) - cached
        rate = self.input if self.cached is None else self.cached
        return (fresh * self.input + cached * rate + amounts.get("tokens", 0) * self.output) / 1e6


class RecaptionSettings(StageSettings):
    engine: Literal["vllm", "openai", "transformers"] = Field(
        "vllm", description="vllm: offline, on GPUs; openai: servers; transformers: also on CPUs"
    )
    model: str = Field(
        "Qwen/Qwen3-8B", description="hub id, folder, demo://captioner, or as served"
    )
    revision: str | None = Field(None, description="of the model on the hub; a commit is exact")
    prompt: str | None = Field(None, description="template; {column} is filled in, {{ is a brace")
    prompt_file: str | None = Field(None, description="file of the template")
    preset: str | None = Field(
        None, description="a prompt of ours, by its name; default: rewrite, without the two above"
    )
    quality: QualitySettings = Field(
        default_factory=QualitySettings, description="what a caption must be: see below"
    )
    max_tokens: int = Field(256, ge=1, description="of an answer")
    temperature: float = Field(0.0, ge=0, le=5, description="0: always the likeliest token")
    top_p: float = Field(1.0, gt=0, le=1, description="share of probability that is drawn from")
    seed: int = Field(0, description="of sampling; each clip draws from its own")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto",
        description="auto: with transformers float32, where a batch never changes an answer; "
        "with vllm as the weights are",
    )
    template_args: dict[str, Any] = Field(
        default_factory=lambda: {"enable_thinking": False},
        description="for the model's chat template; to servers as chat_template_kwargs, unless {}",
    )
    batch_size: Speed[int | None] = Field(
        None, ge=1, description="transformers: prompts of one forward pass; default 16"
    )
    max_model_len: int = Field(4096, ge=16, description="vllm: tokens of prompt and answer")
    engine_args: dict[str, Any] = Field(default_factory=dict, description="vllm: more of vllm.LLM")
    device: Speed[Literal["auto", "cpu", "cuda"]] = Field("auto", description="transformers: where")
    endpoints: Speed[tuple[str, ...]] = Field((), description="openai: base URLs, used in turn")
    api_key_env: Speed[str | None] = Field(None, description="openai: variable that holds the key")
    concurrency: Speed[int] = Field(
        64, ge=1, description="openai: most requests at once, an endpoint and worker; it adapts"
    )
    timeout: Speed[float] = Field(120.0, gt=0, description="openai: seconds for an answer")
    retries: Speed[int] = Field(4, ge=0, description="openai: further tries after a passing fault")
    backoff: Speed[float] = Field(1.0, ge=0, description="openai: seconds before the second try")
    price: Speed[PriceSettings | None] = Field(
        None,
        description="openai: money for a million tokens, `{input: 0.15, output: 0.60}`, and "
        "`cached`, of prompts; default: as input. Tells the cost, nothing else",
    )

    @model_validator(mode="after")
    def _check(self) -> RecaptionSettings:
        named = [n for n in ("preset", "prompt", "prompt_file") if getattr(self, n) is not None]
        if len(named) > 1:
            raise ValueError(f"{' and '.join(named)} are both set: keep one")
        if self.engine == "openai" and not self.endpoints:
            raise ValueError("engine openai needs endpoints: [http://host:8000/v1]")
        if self.api_key_env and any("@" in urlsplit(url).netloc for url in self.endpoints):
            raise ValueError(
                "endpoints has a user and password, and api_key_env names a key; both go into the "
                "one Authorization header of a request: keep one"
            )
        try:
            prompt = load_prompt(self.preset, self.prompt, self.prompt_file)
        except StageError as error:
            raise ValueError(str(error)) from error
        if self.max_tokens < prompt.tokens:
            raise ValueError(
                f"max_tokens is {self.max_tokens}: preset {prompt.name} asks for an answer that "
                f"may need {prompt.tokens}"
            )
        return self


@dataclass(frozen=True, slots=True)
class _Asked:
    """A row whose answer is out."""

    row: Row
    prompt: str
    attempt: int  # from 1


def _counted(result: Result) -> None:
    """Tells how many tokens went into an answer, as far as its engine says."""
    if isinstance(result, Answer):
        for what in ("tokens", "prompt_tokens", "cached_tokens"):
            count(what, getattr(result, what) or 0)


class Recaption(RowStage[RecaptionSettings, Engine]):
    """The caption rewritten by a language model, beside the raw answer and what made it."""

    name = "recaption"
    Settings = RecaptionSettings
    adds = pa.schema(
        [
            pa.field("recaption", pa.string()),
            pa.field("recaption_raw", pa.string()),  # the answer as it came
            pa.field("recaption_model", pa.string()),
            pa.field("recaption_prompt", pa.string()),  # of a preset its name, and the hash
            pa.field("recaption_tokens", pa.int32()),  # of the answer
            pa.field("recaption_prompt_tokens", pa.int32()),
            pa.field("recaption_truncated", pa.bool_()),  # cut off at max_tokens
            *COLUMNS,
        ]
    )
    after = ("filter",)
    transient = (
        *("engine_unreachable", "network", "timeout", "bad_answer", "killed_engine"),
        *("http_408", "http_409", "http_425", "http_429", "http_5??"),
    )
    default_resources = Resources(cpus=1)

    @functools.cached_property
    def prompt(self) -> Prompt:
        s = self.settings
        return load_prompt(s.preset, s.prompt, s.prompt_file)

    @property
    def template(self) -> Template:
        return self.prompt.template

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]
        quality = self.settings.quality
        beside = (quality.original,) if quality.compares or self.prompt.captions else ()
        return tuple(dict.fromkeys((*self.template.columns, *beside)))

    @property
    def accelerated(self) -> bool:
        s = self.settings
        return s.engine == "vllm" or (s.engine == "transformers" and s.device != "cpu")

    def bind(self, columns: pa.Schema) -> None:
        for column in self.reads:
            if column in columns.names:
                continue
            asked = column in self.template.columns
            where = f"the prompt has {{{column}}}" if asked else f"quality.original is {column}"
            raise StageError(
                f"{where} and there is no such column.{did_you_mean(column, columns.names)}"
            )

    def check(self) -> None:
        s = self.settings
        if s.engine == "openai":
            if s.api_key_env and not os.environ.get(s.api_key_env):
                # A key that was written here in place of a name must not be repeated.
                name = s.api_key_env if _VARIABLE.fullmatch(s.api_key_env) else "something"
                raise StageError(
                    f"recaption.api_key_env names {name}, which is not set: export the key under "
                    "that name (the setting is the variable's name, never the key)"
                )
            return
        check(s.model)
        if s.engine == "vllm":
            if importlib.util.find_spec("vllm") is None:
                raise StageError(
                    "recaption.engine is vllm, which is not installed: "
                    "pip install 'vidpipe[vllm]', or set recaption.engine to openai or transformers"
                )
            wide = ("tensor_parallel_size", "pipeline_parallel_size")
            gpus = functools.reduce(lambda n, k: n * int(s.engine_args.get(k, 1)), wide, 1)
            if gpus > 1 and s.gpus != gpus:
                raise StageError(f"recaption.engine_args spread over {gpus} GPUs: set gpus: {gpus}")

    def identity(self) -> dict[str, Any]:
        values = super().identity()
        s = self.settings
        known: dict[str, Any] = dict(values["settings"])
        # The template's text counts, not where it came from; the model's files, not their place.
        for name in ("preset", "prompt", "prompt_file", "model", "revision"):
            del known[name]
        prompt = self.prompt
        answer = {"max_words": prompt.max_words, "schema": prompt.schema, "main": prompt.main}
        known["engine_args"] = {k: v for k, v in s.engine_args.items() if k not in _SPEED_ARGS}
        model = (
            {"served": s.model, "revision": s.revision}
            if s.engine == "openai"
            else model_identity(s.model, s.revision)
        )
        template = digest(self.template.text)
        return {**values, "settings": known, "model": model, "template": template, "answer": answer}

    def cost(self, amounts: Mapping[str, float]) -> float | None:
        price = self.settings.price
        return None if price is None else price.of(amounts)

    def check_here(self) -> None:
        if self.settings.engine == "transformers":
            check_device(self.settings.device)

    def setup(self) -> Engine:
        self.check()  # here too: a worker's machine may lack what the driver's has
        s = self.settings
        if s.engine == "openai":
            from stages.engines.openai import OpenAIEngine

            label = f"{s.model}@{s.revision}" if s.revision else s.model
            key = os.environ.get(s.api_key_env) if s.api_key_env else None
            return OpenAIEngine(
                s.endpoints,
                s.model,
                label,
                key,
                s.concurrency,
                s.timeout,
                s.retries,
                s.backoff,
                s.template_args,
            )
        folder = resolve(s.model, s.revision)
        label = model_label(s.model, s.revision, folder)
        if s.engine == "vllm":
            from stages.engines.vllm import VllmEngine

            return VllmEngine(
                folder, label, s.dtype, s.max_model_len, s.engine_args, s.template_args
            )
        from stages.engines.transformers import TransformersEngine

        dtype = "float32" if s.dtype == "auto" else s.dtype
        batch = s.batch_size or 16
        return TransformersEngine(folder, label, dtype, s.device, batch, s.template_args)

    def teardown(self, model: Engine) -> None:
        model.close()

    def answers(self, rows: Iterable[Row], model: Engine) -> Generator[tuple[int, Outcome]]:
        """The outcomes of rows by their numbers, as the engine answers them."""
        s = self.settings
        asked: dict[int, _Asked] = {}
        again: deque[int] = deque()
        unasked: deque[tuple[int, Outcome]] = deque()

        def awaited() -> Iterator[Row]:
            """The rows; the time for which the engine has nothing to do meanwhile is told."""
            coming = iter(rows)
            while True:
                began = time.perf_counter()
                row = next(coming, None)
                if not asked:
                    spent("wait", time.perf_counter() - began)
                if row is None:
                    return
                yield row

        coming = enumerate(awaited())

        def requests() -> Iterator[tuple[int, Request] | None]:
            while True:
                if again:
                    number = again.popleft()
                    yield number, self._request(asked[number])
                elif (one := next(coming, None)) is not None:
                    number, row = one
                    prompt = self.template.render(row)
                    if isinstance(prompt, str):
                        asked[number] = _Asked(row, prompt, 1)
                        yield number, self._request(asked[number])
                    else:
                        unasked.append((number, prompt))
                elif asked:
                    yield None  # an answer that is out may have to be asked for again
                else:
                    return

        sampling = SamplingSettings(s.max_tokens, s.temperature, s.top_p, self.prompt.schema)
        with closing(model.stream(requests(), sampling)) as answers:
            for number, result in answers:
                alive()
                was = asked.pop(number)
                _counted(result)
                outcome = self._outcome(was, result, model)
                if outcome is None:
                    count("asked_again", 1)
                    asked[number] = replace(was, attempt=was.attempt + 1)
                    again.append(number)
                else:
                    if isinstance(outcome, dict) and outcome["recaption_source"] == "original":
                        count("originals", 1)
                    yield number, outcome
                while unasked:
                    yield unasked.popleft()
        yield from unasked

    def _request(self, asked: _Asked) -> Request:
        s = self.settings
        seed = seed_of(s.seed, asked.row["clip_id"], asked.attempt)
        if asked.attempt == 1:
            return Request(asked.prompt, seed)
        return Request(asked.prompt, seed, max(s.temperature, s.quality.retry_temperature))

    def _outcome(self, asked: _Asked, result: Result, model: Engine) -> Outcome | None:
        """None: it is to be asked again."""
        if isinstance(result, EngineFailure):
            return Failed(result.error, result.message)
        quality = self.settings.quality
        original = asked.row.get(quality.original)
        made = {
            "recaption_raw": result.text,
            "recaption_model": model.label,
            "recaption_prompt": self.prompt.label,
            "recaption_tokens": result.tokens,
            "recaption_prompt_tokens": result.prompt_tokens,
            "recaption_truncated": result.truncated,
        }
        verdict = judge(result, self.prompt, quality, original)
        return settle(verdict, quality, asked.attempt, original, made)
