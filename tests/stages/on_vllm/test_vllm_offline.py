"""The stage over vLLM's own engine."""

from __future__ import annotations

import json
import os
import signal

from serving import BLOCK, SEATS, answered, clips, right, stage

from stages.base import telling
from stages.engines.base import Answer, EngineFailure, Request, SamplingSettings, ask
from stages.engines.vllm import VllmEngine

SCHEMA = {
    "type": "object",
    "properties": {"short": {"type": "string", "maxLength": 20}, "n": {"enum": [1, 2]}},
    "required": ["short", "n"],
    "additionalProperties": False,
}


def test_captions_keep_their_facts_and_their_tokens_are_counted(engine: VllmEngine) -> None:
    rows = clips(100)
    outcomes, counted = answered(stage(), rows, engine)
    assert right(rows, outcomes) >= 95
    assert not any(o["recaption_truncated"] for o in outcomes)
    assert counted["tokens"] >= sum(o["recaption_tokens"] for o in outcomes) > 1000
    assert counted["prompt_tokens"] >= sum(o["recaption_prompt_tokens"] for o in outcomes) > 2000


def test_captions_are_those_of_transformers(engine: VllmEngine) -> None:
    rows = clips(100, first=1000)
    outcomes, _ = answered(stage(), rows, engine)
    other = stage(engine="transformers", device="cpu", engine_args={})
    expected, _ = answered(other, rows, other.setup())
    same = sum(a["recaption_raw"] == b["recaption_raw"] for a, b in zip(outcomes, expected))
    assert same >= 99, "99%"


def test_what_prompts_begin_with_alike_is_computed_once(engine: VllmEngine) -> None:
    """A preset's instructions, before the caption itself."""
    made, rows = stage(preset="vid_gen-45-words", max_tokens=8), clips(40, first=5000)
    _, counted = answered(made, rows[:1], engine)
    _, counted = answered(made, rows, engine)
    asked = counted["prompt_tokens"]
    shared = made.template.text.partition("{caption}")[0]
    common = len(engine._tokenizer(shared).input_ids) // BLOCK * BLOCK
    times = len(rows) + counted["asked_again"]
    assert common >= 5 * BLOCK
    assert times * (common - BLOCK) <= counted["cached_tokens"] < asked


def test_what_does_not_fit_or_is_cut_is_told(engine: VllmEngine) -> None:
    requests = [Request("x " * 2000, 1), Request(clips(1)[0]["caption"], 1)]
    failed, cut = ask(engine, requests, SamplingSettings(max_tokens=2))
    assert isinstance(failed, EngineFailure)
    assert failed.error == "prompt_too_long"
    assert (cut.tokens, cut.truncated) == (2, True)


def test_answers_keep_to_a_schema(engine: VllmEngine) -> None:
    requests = [Request(row["caption"], 1) for row in clips(4)]
    for answer in ask(engine, requests, SamplingSettings(max_tokens=96, schema=SCHEMA)):
        assert isinstance(answer, Answer)
        told = json.loads(answer.text)
        assert set(told) == {"short", "n"} and told["n"] in (1, 2) and len(told["short"]) <= 20


def test_a_seed_is_a_requests_own(engine: VllmEngine) -> None:
    prompt = clips(1)[0]["caption"]
    requests = [Request(prompt, seed) for seed in range(12)]
    sampling = SamplingSettings(max_tokens=20, temperature=2.0)
    first = [a.text for a in ask(engine, requests, sampling)]
    again = [a.text for a in ask(engine, requests[::-1], sampling)]
    assert again[::-1] == first
    assert len(set(first)) > 2


def test_a_killed_engine_costs_no_caption(engine: VllmEngine) -> None:
    rows = clips(120, first=300)
    prompts = [str(stage().template.render(row)) for row in rows]
    requests = [Request(prompt, 1) for prompt in prompts]
    sampling = SamplingSettings(max_tokens=96)
    expected = ask(engine, requests, sampling)
    results: dict[int, object] = {}
    told: list[str] = []
    with telling(told.append):
        for number, result in engine.stream(iter(enumerate(requests)), sampling):
            assert number not in results
            results[number] = result
            if len(results) == 40:
                core = engine._llm.llm_engine.engine_core.resources.engine_manager.processes[0]
                os.kill(core.pid, signal.SIGKILL)
    texts = [getattr(results[number], "text", None) for number in range(len(requests))]
    assert texts == [getattr(answer, "text", None) for answer in expected]
    assert len(told) == 1 and "died with" in told[0]
    assert 0 < int(told[0].split("died with ")[1].split()[0]) <= SEATS + SEATS // 4
