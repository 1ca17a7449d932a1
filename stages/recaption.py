"""recaption: captions rewritten by a language model, the old one and the model on record.

What is read is what the prompt names: `{caption}`, or any other column in braces.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import os
import re
import string
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
from pydantic import Field, model_validator

from manifests.schema import did_you_mean, digest
from stages.base import (
    Failed,
    Outcome,
    Rejected,
    Resources,
    Row,
    Speed,
    Stage,
    StageError,
    StageSettings,
    alive,
)
from stages.devices import check_device
from stages.engines.base import Engine, EngineFailure, Request, Result, SamplingSettings
from stages.models import check, model_identity, model_label, resolve

DEFAULT_PROMPT = Path(__file__).parent / "prompts" / "rewrite.txt"

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
_QUOTES = {'"': '"', "'": "'", "“": "”", "‘": "’", "«": "»", "`": "`"}


class RecaptionSettings(StageSettings):
    engine: Literal["vllm", "openai", "transformers"] = Field(
        "vllm", description="vllm: offline, on GPUs; openai: servers; transformers: also on CPUs"
    )
    model: str = Field(
        "Qwen/Qwen3-8B", description="hub id, folder, demo://captioner, or as served"
    )
    revision: str | None = Field(None, description="of the model on the hub; a commit is exact")
    prompt: str | None = Field(None, description="template; {column} is filled in, {{ is a brace")
    prompt_file: str | None = Field(None, description="file of the template; default: our own")
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
    concurrency: Speed[int] = Field(64, ge=1, description="openai: requests at once, a worker")
    timeout: Speed[float] = Field(120.0, gt=0, description="openai: seconds for an answer")
    retries: Speed[int] = Field(4, ge=0, description="openai: further tries after a passing fault")
    backoff: Speed[float] = Field(1.0, ge=0, description="openai: seconds before the second try")

    @model_validator(mode="after")
    def _check(self) -> RecaptionSettings:
        if self.prompt is not None and self.prompt_file is not None:
            raise ValueError("prompt and prompt_file are both set: keep one")
        if self.engine == "openai" and not self.endpoints:
            raise ValueError("engine openai needs endpoints: [http://host:8000/v1]")
        try:
            load_template(self)
        except StageError as error:
            raise ValueError(str(error)) from error
        return self


@dataclass(frozen=True)
class Template:
    """A prompt with columns in braces."""

    text: str
    columns: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Template:
        """Raises StageError for braces that are no plain column names."""
        text = text.strip()
        try:
            parts = list(string.Formatter().parse(text))
        except ValueError as error:
            raise StageError(f"the prompt's braces don't match: {error}") from error
        columns = []
        for _, name, spec, conversion in parts:
            if name is None:
                continue
            if not name.isidentifier() or spec or conversion:
                raise StageError(
                    f"the prompt has {{{name}}}: braces hold the name of a column and nothing "
                    "else; write {{ and }} for braces of the text"
                )
            columns.append(name)
        if not columns:
            raise StageError("the prompt names no column: put {caption} where the caption goes")
        return cls(text, tuple(dict.fromkeys(columns)))

    def render(self, row: Row) -> str | Rejected:
        for column in self.columns:
            if row[column] is None or not str(row[column]).strip():
                return Rejected(f"empty_{column}", f"{column} is empty, and the prompt is about it")
        return self.text.format_map({c: str(row[c]).strip() for c in self.columns})


def load_template(settings: RecaptionSettings) -> Template:
    """Raises StageError where there is none, or it is none."""
    if settings.prompt is not None:
        return Template.parse(settings.prompt)
    file = Path(settings.prompt_file or DEFAULT_PROMPT)
    try:
        return Template.parse(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise StageError(f"prompt_file {file} can't be read: {error}") from error


def clean(text: str) -> str:
    """An answer as a caption: one line, without thoughts, blanks and quotes around it."""
    text = re.sub(r"\A\s*<think>.*?(</think>|\Z)", "", text, flags=re.DOTALL)
    text = " ".join(text.split())
    while len(text) > 1 and _QUOTES.get(text[0]) == text[-1]:
        inner = text[1:-1]
        if text[0] in inner or text[-1] in inner:
            break  # "A dog" and "a cat": two quotations, not one around all
        text = inner.strip()
    return text


def seed_of(seed: int, clip_id: str) -> int:
    """The clip's own seed, 31 bits: the order of rows and the batch don't matter."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{clip_id}".encode()).digest()[:4], "big") >> 1


class Recaption(Stage[RecaptionSettings, Engine]):
    """The caption rewritten by a language model, beside the raw answer and what made it."""

    name = "recaption"
    Settings = RecaptionSettings
    adds = pa.schema(
        [
            pa.field("recaption", pa.string()),
            pa.field("recaption_raw", pa.string()),  # the answer as it came
            pa.field("recaption_model", pa.string()),
            pa.field("recaption_prompt", pa.string()),  # hash of the template
            pa.field("recaption_tokens", pa.int32()),  # of the answer
            pa.field("recaption_prompt_tokens", pa.int32()),
            pa.field("recaption_truncated", pa.bool_()),  # cut off at max_tokens
        ]
    )
    after = ("filter",)
    transient = (
        *("engine_unreachable", "network", "timeout", "bad_answer", "killed_engine"),
        *("http_408", "http_409", "http_425", "http_429", "http_5??"),
    )
    default_resources = Resources(cpus=1)

    @functools.cached_property
    def template(self) -> Template:
        return load_template(self.settings)

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]
        return self.template.columns

    @property
    def batch_size(self) -> int:
        """Rows taken at once: one, as the engine asks for each when it has room."""
        return 1

    @property
    def accelerated(self) -> bool:
        s = self.settings
        return s.engine == "vllm" or (s.engine == "transformers" and s.device != "cpu")

    def bind(self, columns: pa.Schema) -> None:
        for column in self.reads:
            if column not in columns.names:
                raise StageError(
                    f"the prompt has {{{column}}} and there is no such column."
                    f"{did_you_mean(column, columns.names)}"
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
        for name in ("prompt", "prompt_file", "model", "revision"):
            del known[name]
        known["engine_args"] = {k: v for k, v in s.engine_args.items() if k not in _SPEED_ARGS}
        model = (
            {"served": s.model, "revision": s.revision}
            if s.engine == "openai"
            else model_identity(s.model, s.revision)
        )
        return {**values, "settings": known, "model": model, "template": digest(self.template.text)}

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

    def process(self, rows: list[Row], model: Engine) -> Sequence[Outcome]:
        outcomes = dict(self._streamed(rows, model))
        return [outcomes[number] for number in range(len(rows))]

    def stream(
        self, batches: Iterator[pa.Table], model: Engine
    ) -> Generator[tuple[int, Sequence[Outcome]]]:
        rows = (batch.to_pylist()[0] for batch in batches)
        with closing(self._streamed(rows, model)) as outcomes:
            for number, outcome in outcomes:
                yield number, [outcome]

    def _streamed(self, rows: Iterable[Row], model: Engine) -> Generator[tuple[int, Outcome]]:
        """The outcomes of rows by their numbers, as the engine answers them."""
        s = self.settings
        unasked: deque[tuple[int, Outcome]] = deque()

        def requests() -> Iterator[tuple[int, Request]]:
            for number, row in enumerate(rows):
                prompt = self.template.render(row)
                if isinstance(prompt, str):
                    yield number, Request(prompt, seed_of(s.seed, row["clip_id"]))
                else:
                    unasked.append((number, prompt))

        sampling = SamplingSettings(s.max_tokens, s.temperature, s.top_p)
        with closing(model.stream(requests(), sampling)) as answers:
            for number, result in answers:
                alive()
                yield number, self._outcome(result, model)
                while unasked:
                    yield unasked.popleft()
        yield from unasked

    def _outcome(self, result: Result, model: Engine) -> Outcome:
        if isinstance(result, EngineFailure):
            return Failed(result.error, result.message)
        caption = clean(result.text)
        if not caption:
            return Failed("empty_answer", f"the model wrote {result.text!r:.80}")
        return {
            "recaption": caption,
            "recaption_raw": result.text,
            "recaption_model": model.label,
            "recaption_prompt": digest(self.template.text),
            "recaption_tokens": result.tokens,
            "recaption_prompt_tokens": result.prompt_tokens,
            "recaption_truncated": result.truncated,
        }
