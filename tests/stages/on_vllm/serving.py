"""The demo's captioner under vLLM: as a stage, and as a server that can be killed and started."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import stages
from stages.base import Context, Outcome, Row, counting
from stages.demo.shapes import caption, named, scene
from stages.engines.base import Engine
from stages.engines.vllm import COMPACT_JSON
from stages.recaption import Recaption, RecaptionSettings

CAPTIONER = Path(stages.__file__).parent / "demo" / "captioner"
LENGTH = 512  # tokens of prompt and answer that it takes
BLOCK = 32  # tokens of a prompt that are kept, and found again, together
SEATS = 16  # requests that run at once
ENGINE_ARGS = {
    "enforce_eager": True,
    "max_num_seqs": SEATS,
    "gpu_memory_utilization": 0.3,
    "block_size": BLOCK,
}
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
START_SECONDS = 400
NAME = "the-demo-s"


def stage(**changes: Any) -> Recaption:
    """recaption over vLLM's own engine; in float32, where a batch changes no answer."""
    settings = {
        "engine": "vllm",
        "model": "demo://captioner",
        "max_tokens": 96,
        "max_model_len": LENGTH,
        "dtype": "float32",
        "engine_args": ENGINE_ARGS,
    }
    return Recaption(RecaptionSettings(**{**settings, **changes}), Context("/work"))


def clips(n: int, first: int = 0) -> list[Row]:
    return [{"clip_id": str(s), "caption": caption(scene(s))} for s in range(first, first + n)]


def right(rows: list[Row], outcomes: list[Outcome]) -> int:
    """How many captions name their clip's shape, colour and direction."""
    scenes = [scene(int(row["clip_id"])) for row in rows]
    facts = [(one.shape, one.colour, one.direction) for one in scenes]
    return sum(isinstance(o, dict) and named(o["recaption"]) == f for o, f in zip(outcomes, facts))


def answered(made: Recaption, rows: list[Row], engine: Engine) -> tuple[Any, Counter[str]]:
    """The outcomes, and what was counted for the receipt."""
    counted: Counter[str] = Counter()
    with counting(lambda what, n: counted.update({what: n})):
        return made.process(rows, engine), counted


@dataclass
class Server:
    """vLLM's server on 127.0.0.1, by its module: `vllm serve` asks for a distribution of that name,
    which a build for CPUs is not."""

    log: Path
    port: int = 0
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        if not self.port:
            with closing(socket.socket()) as free:
                free.bind(("127.0.0.1", 0))
                self.port = free.getsockname()[1]
        words = ["--model", str(CAPTIONER), "--served-model-name", NAME, "--dtype", "float32"]
        words += ["--host", "127.0.0.1", "--port", str(self.port), "--enforce-eager"]
        words += ["--max-model-len", str(LENGTH), "--max-num-seqs", str(SEATS)]
        words += ["--block-size", str(BLOCK), "--gpu-memory-utilization", "0.3"]
        words += ["--structured-outputs-config", json.dumps(COMPACT_JSON)]
        words += ["--enable-prompt-tokens-details"]  # else it does not say what was cached
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words],
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, **ENVIRONMENT},
            )
        deadline = time.monotonic() + START_SECONDS
        while not self.healthy():
            assert self.process.poll() is None, self.log.read_text(errors="replace")[-4000:]
            assert time.monotonic() < deadline, "the server does not come up"
            time.sleep(0.5)

    def healthy(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}/health", timeout=5) as answer:
                return bool(answer.status == 200)
        except OSError:
            return False

    def kill(self) -> None:
        """With its engine: they are a group of their own."""
        if self.process is not None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(30)
            self.process = None
