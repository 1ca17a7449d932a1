"""The stage over vLLM's own server."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import closing

import pytest
from serving import BLOCK, LENGTH, NAME, Server, answered, clips, right, stage
from test_vllm_offline import SCHEMA

from stages.base import Failed, StageError
from stages.captions.prompt import Template
from stages.engines.base import Answer, Request, SamplingSettings, ask
from stages.engines.openai import OpenAIEngine
from stages.recaption import Recaption


def asking(server: Server, **changes: object) -> Recaption:
    own = {"engine": "openai", "model": NAME, "endpoints": [server.url], "dtype": "auto"}
    return stage(**{**own, "engine_args": {}, "concurrency": 16, "backoff": 0.2, **changes})


@pytest.fixture
def client(server: Server) -> Iterator[OpenAIEngine]:
    with closing(asking(server).setup()) as engine:
        assert isinstance(engine, OpenAIEngine)
        yield engine


def test_captions_are_those_of_transformers(server: Server, client: OpenAIEngine) -> None:
    rows = clips(100)
    outcomes, counted = answered(asking(server), rows, client)
    assert right(rows, outcomes) >= 95
    other = stage(engine="transformers", device="cpu", engine_args={})
    expected, known = answered(other, rows, other.setup())
    same = sum(a["recaption_raw"] == b["recaption_raw"] for a, b in zip(outcomes, expected))
    assert same >= 99
    assert counted["prompt_tokens"] == known["prompt_tokens"] > 2000
    assert counted["tokens"] == pytest.approx(known["tokens"], rel=0.01)


def test_the_server_tells_what_prompts_had_in_common(server: Server, client: OpenAIEngine) -> None:
    made, rows = asking(server, preset="vid_gen-45-words", max_tokens=8), clips(40, first=5000)
    answered(made, rows[:1], client)
    _, counted = answered(made, rows, client)
    assert 5 * BLOCK * len(rows) <= counted["cached_tokens"] < counted["prompt_tokens"]


def test_a_prompt_that_is_too_long_fails_alone(server: Server, client: OpenAIEngine) -> None:
    rows = clips(3)
    rows[1]["caption"] = "x " * 2000
    first, long, last = asking(server).process(rows, client)
    assert isinstance(long, Failed)
    assert long.error == "http_400" and str(LENGTH) in long.message
    assert isinstance(first, dict) and isinstance(last, dict)


def test_another_name_is_refused_before_any_row(server: Server) -> None:
    made = asking(server, model="another", retries=0)
    with closing(made.setup()) as engine, pytest.raises(StageError, match=r"http_404.*another"):
        made.process(clips(3), engine)


def test_answers_keep_to_a_schema(client: OpenAIEngine) -> None:
    requests = [Request(row["caption"], 1) for row in clips(4)]
    for answer in ask(client, requests, SamplingSettings(max_tokens=96, schema=SCHEMA)):
        assert isinstance(answer, Answer)
        told = json.loads(answer.text)
        assert set(told) == {"short", "n"} and len(told["short"]) <= 20


def test_a_server_that_is_killed_and_started_again_costs_no_caption(server: Server) -> None:
    made = asking(server, retries=50)
    template: Template = made.template
    prompts = [str(template.render(row)) for row in clips(200, first=300)]
    sampling = SamplingSettings(max_tokens=96)
    results: dict[int, object] = {}

    def again() -> None:
        server.kill()
        server.start()

    killer = threading.Thread(target=again)
    with closing(made.setup()) as engine:
        requests = enumerate(Request(prompt, 1) for prompt in prompts)
        for number, result in engine.stream(requests, sampling):
            assert number not in results
            results[number] = result
            if len(results) == 60:
                killer.start()
        killer.join()
        assert len(results) == len(prompts)
        expected = ask(engine, [Request(prompt, 1) for prompt in prompts], sampling)
    texts = [getattr(results[number], "text", None) for number in range(len(prompts))]
    assert None not in texts
    same = sum(a == getattr(b, "text", "") for a, b in zip(texts, expected))
    assert same >= 198, "99%"
