"""The openai engine against a server that misbehaves (`tests/stages/moody.py`), and against a
healthy one with the same delays: every request answered or with a reason, nothing asked more often
than allowed, and the time over the healthy server's. Then two servers, of which one dies and comes
back."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from benchmarks.figures import report
from stages.engines.base import Answer, EngineFailure, Request, Result, SamplingSettings
from stages.engines.openai import OpenAIEngine

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "stages"))
from moody import Moody, at_random

RETRIES = 4
RATIO = "time over the healthy server's"


def run(args: argparse.Namespace, *servers: Moody, dies: bool = False) -> tuple[float, list[str]]:
    """Seconds, and what is told of the requests. Where it `dies`, the last server does, after a
    quarter of the requests, and comes back after half of them."""
    engine = OpenAIEngine(
        [server.url for server in servers],
        model="moody",
        label="moody",
        key=None,
        concurrency=args.concurrency,
        timeout=args.patience * args.delay,
        retries=RETRIES,
        backoff=args.delay / 5,
        template_args={},
    )
    requests = iter(enumerate(Request(f"clip {i}", i) for i in range(args.requests)))
    results: dict[int, Result] = {}
    twice = 0
    began = time.perf_counter()
    for number, result in engine.stream(requests, SamplingSettings(64)):
        twice += number in results
        results[number] = result
        if dies and len(results) == args.requests // 4:
            servers[-1].close()
        if dies and len(results) == args.requests // 2:
            servers[-1].open()
    took = time.perf_counter() - began
    engine.close()
    reasons = sorted({r.error for r in results.values() if isinstance(r, EngineFailure)})
    asked = sum((s.asked for s in servers[1:]), servers[0].asked)
    lost = args.requests - len(results)
    captions = sum(isinstance(r, Answer) for r in results.values())
    most = max(asked.values())
    if lost or twice or most > 1 + RETRIES:
        raise SystemExit(f"{lost} lost, {twice} answered twice, one asked {most} times")
    return took, [
        f"{took:.1f} s, {captions} captions, {args.requests - captions} with a reason"
        + (f" ({', '.join(reasons)})" if reasons else ""),
        f"{asked.total()} requests, one at most {most} of {1 + RETRIES} times",
        ", ".join(f"{n} {name}" for name, n in sorted(sum_met(servers).items())),
    ]


def sum_met(servers: tuple[Moody, ...]) -> dict[str, int]:
    met = sum((s.met for s in servers[1:]), servers[0].met)
    return {name: n for name, n in met.items() if name != "none"}


def measure(args: argparse.Namespace) -> list[tuple[str, str]]:
    long = 10 * args.patience * args.delay
    how = {"delay": args.delay, "patience": long, "retry_ms": int(1000 * args.delay / 5)}
    with Moody(delay=args.delay) as healthy:
        fine, told = run(args, healthy)
    rows = [("a healthy server", told[0])]
    with Moody(at_random(args.faults, args.seed), **how) as moody:
        took, told = run(args, moody)
    rows += [(f"{args.faults:.0%} of all tries at fault", line) for line in told]
    rows.append((RATIO, f"{took / fine:.2f}"))
    with Moody(delay=args.delay) as a, Moody(delay=args.delay) as b:
        fine, told = run(args, a, b)
    rows.append(("two healthy servers", told[0]))
    with Moody(delay=args.delay) as a, Moody(delay=args.delay) as b:
        took, told = run(args, a, b, dies=True)
    rows += [("one dies and comes back", line) for line in told[:2]]
    rows.append((RATIO, f"{took / fine:.2f}"))
    return rows


if __name__ == "__main__":
    report(
        measure,
        __doc__ or "",
        {
            "--requests": {"type": int, "default": 1000},
            "--faults": {"type": float, "default": 0.3, "help": "share of tries at fault"},
            "--delay": {"type": float, "default": 0.5, "help": "seconds for an answer"},
            "--patience": {"type": float, "default": 3.0, "help": "delays; the engine's timeout"},
            "--concurrency": {"type": int, "default": 16},
            "--seed": {"type": int, "default": 0},
        },
    )
