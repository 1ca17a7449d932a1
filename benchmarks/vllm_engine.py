"""Rewrites of made captions by the demo's captioner through the vllm engine, against vLLM's own
offline run of the same prompts in the same process; then with the engine's process killed amid.
On a CPU: a build of vLLM for it, with HF_HUB_OFFLINE=1 VLLM_CPU_KVCACHE_SPACE=1
VLLM_CPU_OMP_THREADS_BIND=nobind."""

from __future__ import annotations

import argparse
import os
import signal
import time
from pathlib import Path
from typing import Any

import stages
from benchmarks.figures import report
from stages.base import Context
from stages.demo.shapes import caption, scene
from stages.engines.base import Answer, Request, SamplingSettings, ask, encode
from stages.engines.vllm import VllmEngine
from stages.recaption import Recaption, RecaptionSettings

SAMPLING = SamplingSettings(max_tokens=96)
ARGS = {"enforce_eager": True, "max_num_seqs": 16, "gpu_memory_utilization": 0.3}


def own(engine: VllmEngine, requests: list[Request]) -> tuple[float, int, list[str]]:
    """Seconds, tokens and texts of vLLM's own batch run."""
    from vllm import SamplingParams

    llm: Any = engine._llm
    tokenizer = llm.get_tokenizer()
    prompts = [{"prompt_token_ids": encode(tokenizer, r.prompt, {})} for r in requests]
    how = [SamplingParams(max_tokens=96, temperature=0.0, seed=r.seed) for r in requests]
    began = time.perf_counter()
    outputs = llm.generate(prompts, how, use_tqdm=False)
    took = time.perf_counter() - began
    best = [output.outputs[0] for output in outputs]
    return took, sum(len(b.token_ids) for b in best), [b.text for b in best]


def killed(engine: VllmEngine, requests: list[Request], kills: int) -> tuple[float, list[Any], int]:
    """Seconds, results and how many came twice, with so many kills spread over the run."""
    results: dict[int, Any] = {}
    done = twice = 0
    began = time.perf_counter()
    for number, result in engine.stream(iter(enumerate(requests)), SAMPLING):
        twice += number in results
        results[number] = result
        if done < kills and len(results) >= (done + 1) * len(requests) // (kills + 1):
            done += 1
            core: Any = engine._llm.llm_engine.engine_core
            os.kill(core.resources.engine_manager.processes[0].pid, signal.SIGKILL)
    took = time.perf_counter() - began
    return took, [results.get(number) for number in range(len(requests))], twice


def measure(args: argparse.Namespace) -> list[tuple[str, str]]:
    folder = Path(stages.__file__).parent / "demo" / "captioner"
    began = time.perf_counter()
    engine = VllmEngine(str(folder), "captioner", "auto", 512, ARGS, {})
    rows = [("start of the engine", f"{time.perf_counter() - began:.0f} s")]
    settings = RecaptionSettings(engine="vllm", model="demo://captioner")
    template = Recaption(settings, Context("/")).template
    requests = [
        Request(str(template.render({"caption": caption(scene(s))})), s)
        for s in range(args.rewrites)
    ]
    ask(engine, requests[:16], SAMPLING)
    texts: list[str] = []
    for _ in range(args.times):
        alone, tokens, texts = own(engine, requests)
        began = time.perf_counter()
        answers = ask(engine, requests, SAMPLING)
        took = time.perf_counter() - began
        written = sum(a.tokens or 0 for a in answers if isinstance(a, Answer))
        same = sum(isinstance(a, Answer) and a.text == t for a, t in zip(answers, texts))
        rates = tokens / alone, written / took
        rows.append(
            (
                f"{args.rewrites} rewrites, output tokens/s",
                f"vLLM {rates[0]:.0f}, vidpipe {rates[1]:.0f}: {rates[1] / rates[0]:.3f} of it; "
                f"{same} captions the same",
            )
        )
    took, results, twice = killed(engine, requests, args.kills)
    same = sum(isinstance(a, Answer) and a.text == t for a, t in zip(results, texts))
    lost = results.count(None)
    told = f"{took:.0f} s, {lost} lost, {twice} twice, {same} captions as without"
    rows.append((f"the engine killed {args.kills} times", told))
    engine.close()
    return rows


if __name__ == "__main__":
    report(
        measure,
        __doc__ or "",
        {
            "--rewrites": {"type": int, "default": 500},
            "--times": {"type": int, "default": 3},
            "--kills": {"type": int, "default": 5},
        },
    )
