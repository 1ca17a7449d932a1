"""A tiny model that sees, through vLLM's own engine."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import pytest

from stages.engines.base import Answer, EngineFailure, Pictures, Request, SamplingSettings, ask
from stages.engines.transformers_vision import VisionEngine
from stages.engines.vllm import VllmEngine

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None,
    reason="torchvision is not installed: vLLM loads no model that sees without it",
)


def pictures(video: bool, *greys: int) -> Pictures:
    frames = np.stack([np.full((20, 30, 3), grey, np.uint8) for grey in greys])
    return Pictures(frames, 2.0, video)


@pytest.mark.parametrize("video", [False, True], ids=["images", "video"])
def test_it_sees_what_it_sees_with_transformers(
    video: bool, tmp_path: Path, small_machine: None
) -> None:
    """A random Qwen2-VL: as many tokens for the same frames, and answers that hang on them."""
    from tiny_qwen import make_qwen

    folder = str(make_qwen(tmp_path / "qwen"))
    requests = [
        Request("a dog", 1, seen=pictures(video, 0, 20)),
        Request("a dog", 2, seen=pictures(video, 250, 230)),
        Request("the hill", 3, seen=pictures(video, 0, 20, 40)),
        Request("x" * 999, 4, seen=pictures(video, 0, 20)),
    ]
    plain = VisionEngine(folder, "tiny", "float32", "cpu", 4, {})
    expected = ask(plain, requests, SamplingSettings(8))
    args = {"enforce_eager": True, "max_num_seqs": 4, "gpu_memory_utilization": 0.3}
    media = {"video": 1} if video else {"image": 3}
    engine = VllmEngine(folder, "tiny", "bfloat16", 1024, args, {}, media)
    results = ask(engine, requests, SamplingSettings(8))
    again = ask(engine, requests[::-1], SamplingSettings(8))[::-1]
    engine.close()
    *seen, long = results
    *known, also_long = expected
    for one, other in zip(seen, known, strict=True):
        assert isinstance(one, Answer) and isinstance(other, Answer)
        assert one.prompt_tokens == other.prompt_tokens
    assert results[0] != results[1], "it looks at its frames"
    assert [one.text for one in again[:3]] == [one.text for one in seen]
    for failed in (long, also_long):
        assert isinstance(failed, EngineFailure) and failed.error == "prompt_too_long"
