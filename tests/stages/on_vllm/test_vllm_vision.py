"""The stage that describes frames, over vLLM's own engine with a tiny, random Qwen2-VL."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numbered import make
from serving import ENGINE_ARGS
from tiny_qwen import ROOM, SIDE, make_qwen

from stages.base import Context
from stages.describe import Describe, DescribeSettings
from stages.engines.base import EngineFailure, Pictures, Request, SamplingSettings, ask
from stages.engines.choice import open_engine
from stages.engines.transformers_vision import VisionEngine
from stages.engines.vllm import VllmEngine
from stages.media.sampling import Sampling

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("torchvision") is None,
    reason="vLLM's models that see need torchvision, built for the same torch",
)
SAMPLING = SamplingSettings(max_tokens=12)
CLIPS = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_qwen(tmp_path_factory.mktemp("qwen"))


def stage(folder: Path, **changes: Any) -> Describe:
    settings = {
        "engine": "vllm",
        "model": str(folder),
        "prompt": "What is it?",
        "max_tokens": SAMPLING.max_tokens,
        "max_model_len": ROOM,
        "dtype": "float32",
        "frames": {"count": 4, "side": SIDE},
        "quality": {"retries": 0, "fallback": "keep"},
        "engine_args": ENGINE_ARGS,
    }
    context = Context("/work", sampling=Sampling(fps=16, frames=9999))
    return Describe(DescribeSettings(**{**settings, **changes}), context)


@pytest.fixture(scope="module")
def eyes(small_machine: None, folder: Path) -> Iterator[VllmEngine]:
    frames = {"image": 4, "video": 1}
    running = open_engine(stage(folder).settings, "describe", frames)
    assert isinstance(running, VllmEngine)
    yield running
    running.close()


def pictures(number: int, video: bool = False) -> Pictures:
    """One to four pictures of noise, or a video of two or four."""
    draw = np.random.default_rng(number)
    count = 2 + 2 * (number % 2) if video else 1 + number % 4
    return Pictures(draw.integers(0, 256, (count, SIDE, SIDE, 3), np.uint8), 2.0, video)


def texts(results: list[Any]) -> list[str]:
    """Without what is left of a last character that was cut off: vLLM tells nothing of it."""
    return [getattr(result, "text", repr(result)).rstrip("\ufffd") for result in results]


@pytest.mark.parametrize("video", [False, True], ids=["pictures", "video"])
def test_what_is_seen_is_what_transformers_sees(
    eyes: VllmEngine, folder: Path, video: bool
) -> None:
    """One prompt for all: nothing but the pictures tells them apart."""
    requests = [Request("a dog", n, seen=pictures(n, video)) for n in range(CLIPS)]
    found = texts(ask(eyes, requests, SAMPLING))
    other = VisionEngine(str(folder), "tiny", "float32", "cpu", 4, {})
    expected = texts(ask(other, requests, SAMPLING))
    assert len(set(expected)) > CLIPS // 2
    assert sum(a == b for a, b in zip(found, expected)) >= 0.95 * CLIPS, (found, expected)
    assert texts(ask(eyes, requests[::-1], SAMPLING))[::-1] == found, "their order is nothing"


def test_more_pictures_than_there_is_room_for_fail_alone(eyes: VllmEngine) -> None:
    requests = [Request("a dog", 1, seen=pictures(3)), Request("x " * 400, 2, seen=pictures(1))]
    fine, long = ask(eyes, requests, SAMPLING)
    assert not isinstance(fine, EngineFailure)
    assert isinstance(long, EngineFailure) and long.error == "prompt_too_long"


def test_clips_are_described(eyes: VllmEngine, folder: Path, tmp_path: Path) -> None:
    rows = [
        {"clip_id": str(n), "path": str(make(tmp_path / f"{n}.mp4", 30 + n, 30)), "start": None}
        for n in range(6)
    ]
    one = stage(folder)
    outcomes = one.process([{**row, "end": None} for row in rows], eyes)
    assert all(isinstance(outcome, dict) for outcome in outcomes), outcomes
    assert all(outcome["description_raw"] for outcome in outcomes)
    assert {len(outcome["description_times"]) for outcome in outcomes} <= {2, 3, 4}
    assert all(outcome["description_prompt_tokens"] > 8 for outcome in outcomes)
