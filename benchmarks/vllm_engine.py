"""Rewrites of made captions by the demo's captioner through the vllm engine, against vLLM's own
offline run of the same prompts in the same process; then with the engine's process killed amid.
Then through the openai engine over vLLM's server, against the same requests to the same server by
as many loops that do nothing but ask. On a CPU: as `make test-vllm` installs it, with
HF_HUB_OFFLINE=1 VLLM_CPU_KVCACHE_SPACE=1 VLLM_CPU_OMP_THREADS_BIND=nobind."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import stages
from benchmarks.figures import report
from stages.base import Context
from stages.demo.shapes import caption, scene
from stages.engines.base import Answer, Request, SamplingSettings, ask, encode
from stages.engines.openai import OpenAIEngine, chat_url, read_answer
from stages.engines.vllm import VllmEngine
from stages.recaption import Recaption, RecaptionSettings

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "stages" / "on_vllm"))
from serving import NAME, Server

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


def against(
    other: str, rate: float, texts: list[str], results: list[Any], took: float
) -> tuple[str, str]:
    """The figure: tokens/s of ours over those of another, and how many captions are equal."""
    ours = sum(r.tokens or 0 for r in results if isinstance(r, Answer)) / took
    same = sum(isinstance(r, Answer) and r.text == t for r, t in zip(results, texts))
    share = f"{ours / rate:.3f} of it; {same} captions the same"
    return (
        f"{len(texts)} rewrites, output tokens/s",
        f"{other} {rate:.0f}, vidpipe {ours:.0f}: {share}",
    )


async def bare(url: str, requests: list[Request], at_once: int) -> tuple[float, list[Answer]]:
    """Seconds and answers of that many loops that take the next request, ask, and read."""
    import aiohttp

    waiting = iter(list(enumerate(requests)))
    answers: dict[int, Answer] = {}

    async def loop(session: aiohttp.ClientSession) -> None:
        for number, request in waiting:
            question = {
                "model": NAME,
                "messages": [{"role": "user", "content": request.prompt}],
                "max_tokens": SAMPLING.max_tokens,
                "temperature": 0.0,
                "seed": request.seed,
            }
            async with session.post(chat_url(url), json=question) as response:
                answers[number] = read_answer(await response.read())

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        began = time.perf_counter()
        await asyncio.gather(*(loop(session) for _ in range(at_once)))
        took = time.perf_counter() - began
    return took, [answers[number] for number in range(len(requests))]


def served(requests: list[Request], args: argparse.Namespace) -> list[tuple[str, str]]:
    """Over one server; the connections and the limit of ours are warm, as amid a run."""
    rows: list[tuple[str, str]] = []
    server = Server(Path(tempfile.mkdtemp()) / "log")
    began = time.perf_counter()
    server.start()
    rows.append(("start of the server", f"{time.perf_counter() - began:.0f} s"))
    engine = OpenAIEngine(
        [server.url],
        model=NAME,
        label=NAME,
        key=None,
        concurrency=args.concurrency,
        timeout=120.0,
        retries=0,
        backoff=1.0,
        template_args={},
    )
    try:
        ask(engine, requests, SAMPLING)
        for _ in range(args.times):
            alone, answers = asyncio.run(bare(server.url, requests, args.concurrency))
            began = time.perf_counter()
            results = ask(engine, requests, SAMPLING)
            took = time.perf_counter() - began
            texts = [answer.text for answer in answers]
            rate = sum(answer.tokens or 0 for answer in answers) / alone
            rows.append(against("bare loops", rate, texts, results, took))
    finally:
        engine.close()
        server.kill()
    return rows


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
        rows.append(against("vLLM", tokens / alone, texts, answers, took))
    took, results, twice = killed(engine, requests, args.kills)
    same = sum(isinstance(a, Answer) and a.text == t for a, t in zip(results, texts))
    lost = results.count(None)
    told = f"{took:.0f} s, {lost} lost, {twice} twice, {same} captions as without"
    rows.append((f"the engine killed {args.kills} times", told))
    engine.close()
    return rows + served(requests, args)


if __name__ == "__main__":
    report(
        measure,
        __doc__ or "",
        {
            "--rewrites": {"type": int, "default": 500},
            "--times": {"type": int, "default": 3},
            "--kills": {"type": int, "default": 5},
            "--concurrency": {"type": int, "default": 16, "help": "requests at once to the server"},
        },
    )
