"""The real engine where vLLM is installed (`pip install 'vidpipe[vllm]'`, or a CPU build of it);
everywhere, our side of its interface against a stand-in that answers with the prompt."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import stages
from stages.base import Context, StageError
from stages.demo.shapes import caption, named, scene
from stages.engines.base import Answer, EngineFailure, Request, SamplingSettings
from stages.engines.vllm import VllmEngine
from stages.recaption import Recaption, RecaptionSettings

CAPTIONER = Path(stages.__file__).parent / "demo" / "captioner"


@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
@pytest.mark.skipif(not CAPTIONER.is_dir(), reason="the demo's captioner is not here")
def test_vllm_rewrites_through_the_stage(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "nobind")
    settings = RecaptionSettings(
        engine="vllm",
        model="demo://captioner",
        max_tokens=96,
        max_model_len=512,
        engine_args={"enforce_eager": True, "max_num_seqs": 16, "gpu_memory_utilization": 0.3},
    )
    stage = Recaption(settings, Context("/work"))
    stage.check()
    engine = stage.setup()
    rows = [{"clip_id": str(s), "caption": caption(scene(s))} for s in range(16)]
    outcomes = stage.process(rows, engine)
    facts = [(one.shape, one.colour, one.direction) for one in map(scene, range(16))]
    assert sum(named(o["recaption"]) == f for o, f in zip(outcomes, facts)) >= 15
    assert not any(o["recaption_truncated"] for o in outcomes)
    requests = [Request("x " * 2000, 1), Request(rows[0]["caption"], 1)]
    failed, cut = engine.generate(requests, SamplingSettings(max_tokens=2))
    assert isinstance(failed, EngineFailure)
    assert failed.error == "prompt_too_long"
    assert (cut.tokens, cut.truncated) == (2, True)
    engine.close()


class Letters:
    """A tokenizer of letters."""

    chat_template = None

    def __call__(self, text: str) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[ord(c) for c in text])


class StandIn:
    """The part of vllm.LLM that is used: `get_tokenizer` and `generate`."""

    def __init__(self, model: str, **settings: Any) -> None:
        if "nonsense" in settings:
            raise TypeError("unexpected keyword argument 'nonsense'")
        self.settings = settings

    def get_tokenizer(self) -> Letters:
        return Letters()

    def generate(
        self, prompts: list[dict[str, list[int]]], sampling_params: list[Any], use_tqdm: bool
    ) -> list[SimpleNamespace]:
        outputs = []
        for prompt, how in zip(prompts, sampling_params, strict=True):
            tokens = prompt["prompt_token_ids"][: how.max_tokens]
            text = "".join(map(chr, tokens)) + f"/{how.seed}"
            reason = "length" if len(tokens) == how.max_tokens else "stop"
            output = SimpleNamespace(text=text, token_ids=tokens, finish_reason=reason)
            outputs.append(SimpleNamespace(outputs=[output]))
        return outputs


def test_our_side_of_the_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("vllm")
    module.LLM = StandIn
    module.SamplingParams = SimpleNamespace
    monkeypatch.setitem(sys.modules, "vllm", module)
    engine = VllmEngine("folder", "label", "auto", 20, {"max_num_seqs": 4, "seed": 3}, {})
    assert engine._llm.settings == {
        "dtype": "auto",
        "max_model_len": 20,
        "enable_prefix_caching": True,
        "seed": 3,
        "max_num_seqs": 4,
    }
    requests = [Request("x" * 16, 1), Request("dog", 2), Request("y" * 99, 3), Request("house", 4)]
    long, dog, longer, house = engine.generate(requests, SamplingSettings(max_tokens=5))
    assert [long.error, longer.error] == ["prompt_too_long"] * 2
    assert dog == Answer("dog/2", 3, truncated=False)
    assert house == Answer("house/4", 5, truncated=True)
    with pytest.raises(StageError, match="nonsense"):
        VllmEngine("folder", "label", "auto", 20, {"nonsense": 1}, {})
