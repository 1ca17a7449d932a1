"""Which engine answers, and the settings that every stage with one has."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from collections.abc import Mapping
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, model_validator

from stages.base import Speed, StageError, StageSettings
from stages.devices import check_device
from stages.engines.base import Engine
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
    "limit_mm_per_prompt",
    "mm_processor_cache_gb",
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
        """What these tokens cost."""
        cached = amounts.get("cached_tokens", 0)
        fresh = amounts.get("prompt_tokens", 0) - cached
        rate = self.input if self.cached is None else self.cached
        return (fresh * self.input + cached * rate + amounts.get("tokens", 0) * self.output) / 1e6


class EngineSettings(StageSettings):
    """How a model is asked."""

    engine: Literal["vllm", "openai", "transformers"] = Field(
        "vllm", description="vllm: offline, on GPUs; openai: servers; transformers: also on CPUs"
    )
    model: str = Field(
        "Qwen/Qwen3-8B", description="hub id, folder, demo://captioner, or as served"
    )
    revision: str | None = Field(None, description="of the model on the hub; a commit is exact")
    max_tokens: int = Field(256, ge=1, description="of an answer")
    temperature: float = Field(0.0, ge=0, le=2, description="0: always the likeliest token")
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
    def _reachable(self) -> EngineSettings:
        if self.engine == "openai" and not self.endpoints:
            raise ValueError("engine openai needs endpoints: [http://host:8000/v1]")
        if self.api_key_env and any("@" in urlsplit(url).netloc for url in self.endpoints):
            raise ValueError(
                "endpoints has a user and password, and api_key_env names a key; both go into the "
                "one Authorization header of a request: keep one"
            )
        return self

    @property
    def takes_gpu(self) -> bool:
        """Whether a worker takes a GPU by default, where there is one."""
        return self.engine == "vllm" or (self.engine == "transformers" and self.device != "cpu")


def model_of(s: EngineSettings) -> dict[str, Any]:
    """What tells the model from any other, for fingerprints."""
    if s.engine == "openai":
        return {"served": s.model, "revision": s.revision}
    return model_identity(s.model, s.revision)


def args_of(s: EngineSettings) -> dict[str, Any]:
    """The arguments of vllm.LLM that may change answers."""
    return {name: value for name, value in s.engine_args.items() if name not in _SPEED_ARGS}


def check_engine(s: EngineSettings, stage: str) -> None:
    """Before anything runs: key, model, packages. Raises StageError."""
    if s.engine == "openai":
        if s.api_key_env and not os.environ.get(s.api_key_env):
            # A key that was written here in place of a name must not be repeated.
            name = s.api_key_env if _VARIABLE.fullmatch(s.api_key_env) else "something"
            raise StageError(
                f"{stage}.api_key_env names {name}, which is not set: export the key under "
                "that name (the setting is the variable's name, never the key)"
            )
        return
    check(s.model)
    if s.engine == "vllm":
        if importlib.util.find_spec("vllm") is None:
            raise StageError(
                f"{stage}.engine is vllm, which is not installed: "
                f"pip install 'vidpipe[vllm]', or set {stage}.engine to openai or transformers"
            )
        wide = ("tensor_parallel_size", "pipeline_parallel_size")
        gpus = functools.reduce(lambda n, k: n * int(s.engine_args.get(k, 1)), wide, 1)
        if gpus > 1 and s.gpus != gpus:
            raise StageError(f"{stage}.engine_args spread over {gpus} GPUs: set gpus: {gpus}")


def check_engine_here(s: EngineSettings) -> None:
    """The same, of the machine that the workers are to run on. Raises StageError."""
    if s.engine == "transformers":
        check_device(s.device)


def open_engine(s: EngineSettings, stage: str, media: dict[str, int] | None = None) -> Engine:
    """The engine, ready to be asked. `media`: for a model that sees, how many of what a prompt
    has at most: {"image": 8}. Raises StageError."""
    check_engine(s, stage)  # here too: a worker's machine may lack what the driver's has
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
            stage,
        )
    folder = resolve(s.model, s.revision)
    label = model_label(s.model, s.revision, folder)
    if s.engine == "vllm":
        from stages.engines.vllm import VllmEngine

        return VllmEngine(
            folder, label, s.dtype, s.max_model_len, s.engine_args, s.template_args, media
        )
    dtype = "float32" if s.dtype == "auto" else s.dtype
    if media:
        from stages.engines.transformers_vision import VisionEngine

        return VisionEngine(folder, label, dtype, s.device, s.batch_size or 4, s.template_args)
    from stages.engines.transformers import TransformersEngine

    return TransformersEngine(folder, label, dtype, s.device, s.batch_size or 16, s.template_args)
