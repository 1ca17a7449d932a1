"""Our side of vLLM's interface against a stand-in that answers with the prompt; vLLM itself has
its tests in `on_vllm`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing
from queue import SimpleQueue
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from stages.base import StageError
from stages.engines.base import (
    Answer,
    EngineFailure,
    Pictures,
    Request,
    SamplingSettings,
    ask,
)
from stages.engines.vllm import VllmEngine

PLACES = 4  # tokens that pictures take


class Letters:
    """A tokenizer of letters, and a processor with it."""

    chat_template = None

    def __call__(self, text: str, **how: Any) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[ord(c) for c in text])

    def apply_chat_template(self, messages: list[Any], **how: Any) -> str:
        (message,) = messages
        signs = {"image": "#", "video": "="}
        return "".join(signs.get(part["type"]) or part["text"] for part in message["content"])


class Dead(Exception):
    """As vllm.v1.engine.exceptions.EngineDeadError."""


class Refused(Exception):
    """As vllm.exceptions.VLLMClientError."""


class StandIn:
    """The part of vllm.LLM that is used: the tokenizer and the engine, which answers one request a
    step, the last first. A prompt with `die` in it kills the engine; `mortal` ones that often."""

    started = 0
    mortal = 10**9
    silent = 0
    most = 0  # that it ever held

    def __init__(self, model: str, **settings: Any) -> None:
        if "nonsense" in settings:
            raise TypeError("unexpected keyword argument 'nonsense'")
        StandIn.started += 1
        self.settings = settings
        self.llm_engine = self
        seats = SimpleNamespace(max_num_seqs=settings.get("max_num_seqs", 4))
        self.vllm_config = SimpleNamespace(scheduler_config=seats)
        self.held: list[tuple[str, list[int], Any]] = []
        self.media: list[Any] = []
        state = SimpleNamespace(engine_dead=False)
        self.ended = False
        self.engine_core = SimpleNamespace(
            resources=state, outputs_queue=SimpleQueue(), shutdown=self.end
        )

    def end(self) -> None:
        self.ended = True

    def get_tokenizer(self) -> Letters:
        return Letters()

    def add_request(self, name: str, prompt: dict[str, Any], how: Any) -> None:
        if "many" in "".join(map(chr, prompt["prompt_token_ids"])):
            raise Refused("At most 2 image(s) may be provided in one prompt.")
        if len(prompt["prompt_token_ids"]) + PLACES * ("multi_modal_data" in prompt) > 20:
            raise Refused("The prompt is longer than the maximum model length of 20.")
        self.media.append(prompt.get("multi_modal_data"))
        self.held.append((name, prompt["prompt_token_ids"], how))
        StandIn.most = max(StandIn.most, len(self.held))

    def abort_request(self, names: list[str]) -> None:
        self.held = [one for one in self.held if one[0] not in names]

    def step(self) -> list[SimpleNamespace]:
        if StandIn.mortal and any("die" in "".join(map(chr, one[1])) for one in self.held):
            StandIn.mortal -= 1
            raise Dead("it is no more")
        if StandIn.silent and len(self.held) == 2:  # killed before it could say so
            StandIn.silent -= 1
            self.engine_core.resources.engine_dead = True
            raise self.engine_core.outputs_queue.get(timeout=10)
        name, prompt, how = self.held.pop()
        tokens = prompt[: how.max_tokens]
        reason = "length" if len(tokens) == how.max_tokens else "stop"
        text = "".join(map(chr, tokens)) + f"/{how.seed}"
        output = SimpleNamespace(text=text, token_ids=tokens, finish_reason=reason)
        facts = {"prompt_token_ids": prompt, "num_cached_tokens": 1, "finished": True}
        return [SimpleNamespace(request_id=name, outputs=[output], **facts)]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> type[StandIn]:
    modules = {
        "vllm": {"LLM": StandIn, "SamplingParams": SimpleNamespace},
        "vllm.sampling_params": {
            "RequestOutputKind": SimpleNamespace(FINAL_ONLY=2),
            "StructuredOutputsParams": SimpleNamespace,
        },
        "vllm.exceptions": {"VLLMClientError": Refused},
        "vllm.v1": {},
        "vllm.v1.engine": {},
        "vllm.v1.engine.exceptions": {"EngineDeadError": Dead},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    for name, value in (("started", 0), ("mortal", 10**9), ("silent", 0), ("most", 0)):
        monkeypatch.setattr(StandIn, name, value)
    return StandIn


def small(**args: Any) -> VllmEngine:
    return VllmEngine("folder", "label", "auto", 20, args, {})


def test_our_side_of_the_interface(stand_in: type[StandIn]) -> None:
    engine = small(max_num_seqs=4, seed=3)
    assert engine._llm.settings == {
        "dtype": "auto",
        "max_model_len": 20,
        "enable_prefix_caching": True,
        "seed": 3,
        "max_num_seqs": 4,
        "structured_outputs_config": {"backend": "xgrammar", "disable_any_whitespace": True},
    }
    requests = [Request("x" * 16, 1), Request("dog", 2), Request("y" * 99, 3), Request("house", 4)]
    long, dog, longer, house = ask(engine, requests, SamplingSettings(max_tokens=5))
    assert [long.error, longer.error] == ["prompt_too_long"] * 2
    assert dog == Answer("dog/2", 3, False, prompt_tokens=3, cached_tokens=1)
    assert house == Answer("house/4", 5, True, prompt_tokens=5, cached_tokens=1)
    llm = engine._llm
    engine.close()
    assert llm.ended
    engine.close()
    with pytest.raises(StageError, match="nonsense"):
        small(nonsense=1)


def test_a_schema_and_a_requests_own_temperature_go_along(
    stand_in: type[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, asked = small(max_num_seqs=4), []
    add = engine._llm.add_request
    monkeypatch.setattr(engine._llm, "add_request", lambda *a: (asked.append(a[2]), add(*a)))
    schema = {"type": "object"}
    ask(engine, [Request("a", 1), Request("b", 2, 0.7)], SamplingSettings(5, schema=schema))
    assert [how.temperature for how in asked] == [0.0, 0.7]
    assert [how.structured_outputs.json for how in asked] == [schema] * 2
    ask(engine, [Request("a", 1)], SamplingSettings(5))
    assert not hasattr(asked[-1], "structured_outputs")


def test_requests_are_taken_while_others_run(stand_in: type[StandIn]) -> None:
    engine = small(max_num_seqs=4)
    taken: list[int] = []

    def requests() -> Iterator[tuple[int, Request]]:
        for number in range(40):
            taken.append(number)
            yield number, Request("dog", number)

    numbers = []
    with closing(engine.stream(requests(), SamplingSettings(max_tokens=5))) as answers:
        for number, _ in answers:
            numbers.append(number)
            assert len(taken) - len(numbers) <= 5
    assert sorted(numbers) == list(range(40))
    assert stand_in.most == 5, "four run, and one waits"


def test_who_gives_up_leaves_nothing_in_the_engine(stand_in: type[StandIn]) -> None:
    engine = small(max_num_seqs=4)
    answers = engine.stream(iter(enumerate([Request("dog", 1)] * 9)), SamplingSettings(5))
    next(answers)
    answers.close()
    assert engine._llm.held == []
    assert len(ask(engine, [Request("cat", 1)] * 9, SamplingSettings(5))) == 9


def test_a_death_of_the_engine_costs_no_request(stand_in: type[StandIn]) -> None:
    stand_in.mortal = 1
    prompts = ["dog", "die", *["cat"] * 10]
    results = ask(small(), [Request(p, 1) for p in prompts], SamplingSettings(5))
    assert [r.text for r in results] == [f"{p}/1" for p in prompts]
    assert stand_in.started == 2


def test_an_engine_that_dies_without_a_word_is_noticed(stand_in: type[StandIn]) -> None:
    stand_in.silent = 1
    results = ask(small(), [Request("dog", n) for n in range(9)], SamplingSettings(5))
    assert [r.text for r in results] == [f"dog/{n}" for n in range(9)]
    assert stand_in.started == 2


def test_a_request_that_kills_the_engine_fails_alone(stand_in: type[StandIn]) -> None:
    prompts = ["dog", *["cat"] * 5, "die", *["cat"] * 10]
    results = ask(small(), [Request(p, 1) for p in prompts], SamplingSettings(5))
    assert [r.error for r in results if isinstance(r, EngineFailure)] == ["killed_engine"]
    assert isinstance(results[6], EngineFailure)
    assert stand_in.started == 4


def test_an_engine_that_does_not_start_again_is_given_up(
    stand_in: type[StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = small()

    def out_of_memory(self: StandIn, model: str, **settings: Any) -> None:
        raise RuntimeError("Engine core initialization failed")

    monkeypatch.setattr(StandIn, "__init__", out_of_memory)
    for _ in range(2):
        with pytest.raises(StageError, match="Engine core initialization failed"):
            ask(engine, [Request("dog", 1), Request("die", 2)], SamplingSettings(5))


def test_an_engine_that_only_dies_is_given_up(stand_in: type[StandIn]) -> None:
    engine = small()
    with pytest.raises(StageError, match="died 4 times without an answer between"):
        list(engine.stream(iter(enumerate([Request("die", 1)] * 9)), SamplingSettings(5)))
    before = stand_in.started
    with pytest.raises(StageError, match="died 4 times"):
        ask(engine, [Request("dog", 1)], SamplingSettings(5))
    assert stand_in.started == before, "not started again for the next unit"


@pytest.fixture
def seeing(stand_in: type[StandIn], monkeypatch: pytest.MonkeyPatch) -> VllmEngine:
    processor = SimpleNamespace(tokenizer=Letters(), chat_template="...")
    monkeypatch.setattr("stages.engines.vllm.read_processor", lambda folder: processor)
    return VllmEngine("folder", "label", "auto", 20, {"max_num_seqs": 4}, {}, {"image": 2})


def pictures(n: int, video: bool = False, dark: bool = True) -> Pictures:
    greys = [20 * i if dark else 250 - 20 * i for i in range(n)]
    frames = np.stack([np.full((20, 30, 3), grey, np.uint8) for grey in greys])
    return Pictures(frames, 2.0, video)


def test_pictures_go_along_in_order(seeing: VllmEngine) -> None:
    settings = seeing._llm.settings
    assert settings["limit_mm_per_prompt"] == {"image": 2, "video": 0}
    assert settings["mm_processor_cache_gb"] == 0
    shown, moved = (seeing.prepared(pictures(2, video)) for video in (False, True))
    requests = [Request("dog", 1, seen=shown), Request("cat", 2, seen=moved)]
    first, second = ask(seeing, requests, SamplingSettings(9))
    assert (first.text, second.text) == ("##dog/1", "=cat/2")
    images, videos = seeing._llm.media
    assert [np.asarray(one)[0, 0, 0] for one in images["image"]] == [0, 20]
    ((frames, facts),) = videos["video"]
    assert frames.shape == (2, 20, 30, 3)
    assert (facts["fps"], facts["duration"], facts["do_sample_frames"]) == (2.0, 1.0, False)


def test_what_vllm_does_not_take_fails_alone(seeing: VllmEngine) -> None:
    asked = ["dog", "x" * 15, "many", "eleven", "cat"]
    requests = [Request(prompt, 1, seen=pictures(2)) for prompt in asked]
    results = ask(seeing, requests, SamplingSettings(9))
    failures = [r.error if isinstance(r, EngineFailure) else r.text for r in results]
    assert failures == ["##dog/1", "prompt_too_long", "prompt_refused", "##eleven/1", "##cat/1"]
    assert "At most 2 image(s)" in results[2].message
    with pytest.raises(Refused):
        ask(seeing, [Request("many", 1)], SamplingSettings(5))


def test_an_answer_that_the_context_cut_off_is_none(seeing: VllmEngine) -> None:
    """The context ends where prompt, pictures and answer together reach it."""
    (cut,) = ask(seeing, [Request("x" * 14, 1, seen=pictures(1))], SamplingSettings(8))
    assert isinstance(cut, EngineFailure) and cut.error == "prompt_too_long"
