"""describe: which frames reach the engine, in which order and size, and what becomes of answers."""

from __future__ import annotations

import base64
import io
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from moody import Moody
from numbered import make, number
from PIL import Image
from pydantic import ValidationError
from tiny_llava import ROOM, make_llava

from stages.base import Context, Failed, Outcome, Rejected, Row, StageError, counting, spending
from stages.describe import Describe, DescribeSettings
from stages.engines.base import EngineFailure, Pictures, Request, SamplingSettings, ask
from stages.engines.transformers_vision import VisionEngine
from stages.media.sampling import Sampling

CONTEXT = Context("/work", sampling=Sampling(fps=16, frames=9999))
TAKEN = {"retries": 0, "fallback": "keep"}
GOOD = "A white block stands still on a black wall, and the picture does not move."
FRAMES = [0, 15, 30, 45]  # of two seconds at 30 fps


def stage(context: Context = CONTEXT, **settings: Any) -> Describe:
    settings = {"engine": "openai", "endpoints": ["http://127.0.0.1:1"], **settings}
    return Describe(DescribeSettings(**settings), context)


def row(path: Path, clip: str = "a", **more: Any) -> Row:
    return {"clip_id": clip, "path": str(path), "start": None, "end": None, **more}


def run(one: Describe, rows: list[Row], counted: Counter[str] | None = None) -> list[Outcome]:
    engine = one.setup()
    counted = Counter() if counted is None else counted
    with counting(lambda what, n: counted.update({what: n})):
        outcomes = list(one.process(rows, engine))
    one.teardown(engine)
    kept = [outcome for outcome in outcomes if isinstance(outcome, dict)]
    assert pa.Table.from_pylist(kept, schema=one.adds).num_rows == len(kept)
    return outcomes


def picture(data: str) -> np.ndarray:
    head, _, jpeg = data.partition(",")
    assert head == "data:image/jpeg;base64"
    with Image.open(io.BytesIO(base64.b64decode(jpeg))) as opened:
        return np.asarray(opened.convert("RGB"))


def pictures(parts: list[dict[str, Any]]) -> list[np.ndarray]:
    assert {part["type"] for part in parts} == {"image_url"}
    return [picture(part["image_url"]["url"]) for part in parts]


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("videos") / "a.mp4", 60, 30)


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_llava(tmp_path_factory.mktemp("llava"))


# ---------------------------------------------------------------------------- servers


def test_the_right_frames_arrive_in_order(video: Path) -> None:
    with Moody(reply=lambda prompt, nth: GOOD) as server:
        one = stage(endpoints=[server.url], prompt="What is it?")
        (outcome,) = run(one, [row(video)])
        ((parts, question),) = server.shown["What is it?"]
    seen = pictures(parts)
    assert [number(frame) for frame in seen] == FRAMES
    assert {frame.shape for frame in seen} == {(64, 64, 3)}
    assert outcome["description"] == outcome["description_raw"] == GOOD
    assert outcome["description_times"] == [0.0, 0.5, 1.0, 1.5]
    assert outcome["description_source"] == "model" and outcome["description_flags"] == []
    assert "media_io_kwargs" not in question
    assert question["max_tokens"] == 512


def test_count_side_and_pace_are_settings(video: Path) -> None:
    with Moody() as server:
        frames = {"count": 3, "fps": 30, "side": 32}
        run(stage(endpoints=[server.url], prompt="?", frames=frames, quality=TAKEN), [row(video)])
        ((parts, _),) = server.shown["?"]
    seen = pictures(parts)
    assert [frame.shape for frame in seen] == [(32, 32, 3)] * 3
    larger = [np.kron(frame, np.ones((2, 2, 1))) for frame in seen]
    assert [number(frame) for frame in larger] == [9, 29, 49]


def test_a_video_is_one_part_of_all_frames(video: Path) -> None:
    with Moody() as server:
        one = stage(endpoints=[server.url], prompt="?", frames={"form": "video"}, quality=TAKEN)
        run(one, [row(video)])
        (((part,), question),) = server.shown["?"]
    assert part["type"] == "video_url"
    head, *frames = part["video_url"]["url"].split(",")
    assert head == "data:video/jpeg;base64"
    seen = [picture(f"data:image/jpeg;base64,{frame}") for frame in frames]
    assert [number(frame) for frame in seen] == FRAMES
    reading = question["media_io_kwargs"]["video"]
    assert reading == {"num_frames": 4, "fps": pytest.approx(2.0)}


def test_each_clip_is_asked_about_with_its_own_frames(tmp_path: Path) -> None:
    """Whatever is ahead of what, and whoever is slow."""
    rows = [
        row(make(tmp_path / f"{i}.mp4", 5 + i, 30), str(i), caption=f"clip {i}") for i in range(20)
    ]
    with Moody(delay=0.005) as server:
        one = stage(endpoints=[server.url], prompt="{caption}", frames={"fps": 60, "count": 99})
        outcomes = run(one, rows)
    for i, outcome in enumerate(outcomes):
        ((parts, _),) = server.shown[f"clip {i}"]
        assert [number(frame) for frame in pictures(parts)] == list(range(5 + i))
        assert outcome["description"] == f"re: clip {i}"
        assert len(outcome["description_times"]) == 5 + i


def test_a_refusal_is_asked_again_with_the_same_frames(video: Path) -> None:
    def reply(prompt: str, nth: int) -> str:
        return GOOD if nth == 3 else "I'm sorry, but I can't see any video."

    counted: Counter[str] = Counter()
    with Moody(reply=reply) as server:
        (outcome,) = run(stage(endpoints=[server.url], prompt="?"), [row(video)], counted)
        tries = server.shown["?"]
    assert outcome["description"] == GOOD and outcome["description_attempts"] == 3
    assert tries[0][0] == tries[1][0] == tries[2][0], "the frames"
    assert len({question["seed"] for _, question in tries}) == 3
    assert [question["temperature"] for _, question in tries] == [0.0, 0.7, 0.7]
    amounts = {"tokens": 15, "prompt_tokens": 60, "cached_tokens": 36, "asked_again": 2}
    assert counted == amounts


def test_what_never_passes_is_rejected_unless_there_is_something_else(video: Path) -> None:
    with Moody(reply=lambda prompt, nth: "I'm sorry, but I can't do that.") as server:
        here = {"endpoints": [server.url], "prompt": "?"}
        (rejected,) = run(stage(**here), [row(video)])
        fallback = {"fallback": "original"}
        (fallen,) = run(stage(**here, quality=fallback), [row(video, caption="A dog.")])
    assert isinstance(rejected, Rejected) and rejected.reason == "caption_refusal"
    assert (fallen["description"], fallen["description_source"]) == ("A dog.", "original")


def test_clips_that_cant_be_read_cost_themselves_alone(video: Path, tmp_path: Path) -> None:
    (tmp_path / "page.mp4").write_text("<html>not found</html>")
    (tmp_path / "cut.mp4").write_bytes(video.read_bytes()[:700])
    rows = [
        row(tmp_path / "gone.mp4", "1"),
        row(video, "2"),
        row(tmp_path / "page.mp4", "3"),
        row(tmp_path / "cut.mp4", "4"),
        {**row(video, "5"), "start": 50.0},
        row(video, "6"),
    ]
    with Moody() as server:
        outcomes = run(stage(endpoints=[server.url], prompt="?", quality=TAKEN), rows)
    classes = [o.error if isinstance(o, Failed) else "described" for o in outcomes]
    assert classes == [
        *("missing_file", "described", "not_a_video"),
        *("truncated", "empty_section", "described"),
    ]
    assert sum(server.asked.values()) == 2
    context = Context("/work", sampling=Sampling(buckets=[[9, 128, 128]]))
    (small,) = run(stage(context, endpoints=["http://127.0.0.1:1"]), [row(video)])
    assert isinstance(small, Rejected) and small.reason == "no_bucket"


def test_a_clip_that_takes_too_long_names_the_setting(video: Path) -> None:
    slow = stage(decode_seconds=1e-9)
    (outcome,) = run(slow, [row(video)])
    assert isinstance(outcome, Failed) and outcome.error == "decode_timeout"
    assert "(describe.decode_seconds)" in outcome.message
    assert slow.fingerprint == stage().fingerprint
    assert slow.worth_retry("decode_timeout") and slow.worth_retry("http_503")


def test_frames_in_flight_are_bounded_by_their_bytes(video: Path) -> None:
    rows = [row(video, str(i)) for i in range(30)]
    with Moody(delay=0.5) as server:  # far longer than a busy machine takes for the next frames
        free = stage(endpoints=[server.url], prompt="?", quality=TAKEN)
        all_of_it = run(free, rows)
        server.delay = 0.01
        ((parts, _), *_) = server.shown["?"]
        each = sum(len(part["image_url"]["url"].partition(",")[2]) for part in parts)
        assert server.most > 3
        server.most = 0
        tight = stage(endpoints=[server.url], prompt="?", quality=TAKEN, ahead=4 * each)
        assert run(tight, rows) == all_of_it
        assert 1 <= server.most <= 2, "half of them by the engine"
        server.most = 0
        assert run(stage(endpoints=[server.url], prompt="?", quality=TAKEN, ahead=1), rows[:5])
        assert server.most == 1
    assert tight.fingerprint == free.fingerprint


def test_time_without_frames_is_told(video: Path) -> None:
    waited: Counter[str] = Counter()
    with Moody() as server:
        one = stage(endpoints=[server.url], prompt="?", threads=1)
        engine = one.setup()
        with spending(lambda phase, seconds: waited.update({phase: seconds})):
            one.process([row(video)], engine)
        one.teardown(engine)
    assert waited["wait"] > 0


# ---------------------------------------------------------------------------- transformers


def engine(folder: Path, batch: int = 4) -> VisionEngine:
    return VisionEngine(str(folder), "tiny", "float32", "cpu", batch, {"enable_thinking": False})


def shades(*greys: int) -> Pictures:
    tall = np.ones((20, 30, 3), np.uint8)
    ramp = np.arange(30, dtype=np.uint8)[None, :, None]
    return Pictures(np.stack([tall * grey + ramp for grey in greys]), 2.0)


REQUESTS = [
    Request("what is this", 1, seen=shades(0, 90)),
    Request("a dog", 2, seen=shades(30)),
    Request("the hill and all that is on it", 3, seen=shades(200, 100, 0)),
    Request("what is this", 4, seen=shades(200, 20)),
    Request("a dog", 5, seen=shades(220)),
]


@pytest.mark.parametrize("heat", [0.0, 1.0], ids=["greedy", "sampled"])
def test_the_batch_and_the_order_change_no_answer(llava: Path, heat: float) -> None:
    sampling = SamplingSettings(10, heat)
    alone = ask(engine(llava, 1), REQUESTS, sampling)
    assert ask(engine(llava, 4), REQUESTS, sampling) == alone
    assert ask(engine(llava, 3), REQUESTS[::-1], sampling) == alone[::-1]
    assert len({answer.text for answer in alone}) == len(REQUESTS), "it looks at its pictures"


def bare(llava: Path, prompt: str, frames: list[np.ndarray], tokens: int) -> str:
    """What transformers by itself makes of it."""
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(llava)
    model = AutoModelForImageTextToText.from_pretrained(llava).eval()
    text = f"USER: {'<image>' * len(frames)}{prompt} ASSISTANT:"
    shown = [Image.fromarray(frame) for frame in frames]
    inputs = processor(text=text, images=shown, return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    written = output[0, inputs["input_ids"].shape[1] :]
    return str(processor.tokenizer.decode(written, skip_special_tokens=True))


def test_the_stage_says_what_the_bare_model_says_of_these_frames(llava: Path, video: Path) -> None:
    from stages.media.frames import read_clip

    clip = read_clip(str(video), Sampling(fps=2, frames=4, size=64))
    one = stage(
        engine="transformers",
        model=str(llava),
        device="cpu",
        prompt="what is {caption?}",
        max_tokens=12,
        quality={**TAKEN, "trim": False},
    )
    one.check()
    rows = [row(video, "a", caption="the dog"), row(video, "b", caption=None), row(video, "c")]
    rows[2] |= {"caption": "", "end": 1.0}
    first, second, third = run(one, rows)
    assert first["description_raw"] == bare(llava, "what is the dog", list(clip.frames), 12)
    assert first["description_model"].startswith(f"{llava}@")
    # Without a hint the line is left out, and nothing is left.
    assert second["description_raw"] == bare(llava, "", list(clip.frames), 12)
    assert len({o["description_raw"] for o in (first, second, third)}) == 3
    assert third["description_prompt_tokens"] == second["description_prompt_tokens"], "four again"


def test_a_prompt_that_is_too_long_fails_alone(llava: Path) -> None:
    long = Request("x" * ROOM, 1, seen=shades(0))
    first, failed, last = ask(
        engine(llava, 4), [REQUESTS[0], long, REQUESTS[1]], SamplingSettings(9)
    )
    assert isinstance(failed, EngineFailure) and failed.error == "prompt_too_long"
    assert [first, last] == ask(engine(llava), REQUESTS[:2], SamplingSettings(9))


def test_a_folder_that_sees_nothing_is_refused(llava: Path, tmp_path: Path) -> None:
    import shutil

    import stages

    with pytest.raises(StageError, match=r"takes text alone|no processor"):
        engine(Path(stages.__file__).parent / "demo" / "captioner")
    with pytest.raises(StageError, match="no processor of text and pictures"):
        engine(tmp_path)
    mute = shutil.copytree(llava, tmp_path / "mute")
    (mute / "chat_template.jinja").unlink()
    with pytest.raises(StageError, match="no chat template, which says where pictures go"):
        engine(mute)


# ---------------------------------------------------------------------------- settings


def test_only_what_changes_results_is_in_the_fingerprint() -> None:
    base = stage().fingerprint
    same = [
        stage(ahead=5, threads=7, decode_seconds=9, max_pixels=99, concurrency=2),
        stage(engine_args={"limit_mm_per_prompt": {"image": 9}, "mm_processor_cache_gb": 1}),
        stage(Context("/elsewhere", sampling=Sampling(fps=16, frames=9999, size=512, fit="pad"))),
    ]
    assert [one.fingerprint for one in same] == [base] * len(same)
    others = [
        stage(frames={"count": 16}),
        stage(frames={"fps": 1}),
        stage(frames={"side": 336}),
        stage(frames={"form": "video"}),
        stage(frames={"span": "clip"}),
        stage(Context("/work", sampling=Sampling(fps=8, frames=9999))),
        stage(preset="describe-structured", max_tokens=768),
        stage(model="other/model"),
        stage(engine_args={"mm_processor_kwargs": {"max_pixels": 99}}),
    ]
    assert len({base, *(one.fingerprint for one in others)}) == len(others) + 1
    clip = {"span": "clip"}
    other = stage(Context("/work", sampling=Sampling(fps=8)), frames=clip)
    assert other.fingerprint == stage(frames=clip).fingerprint, "sampling has no say in these"


def test_a_caption_is_read_only_where_it_is_asked_for() -> None:
    assert stage().reads == ("content", "start", "end")
    assert stage(preset="describe-structured", max_tokens=768).reads == ("content", "start", "end")
    assert stage(prompt="What? {caption?}").reads[3:] == ("caption",)
    assert stage(quality={"fallback": "original"}).reads[3:] == ("caption",)
    assert stage(quality={"min_overlap": 0.1, "original": "title"}).reads[3:] == ("title",)
    columns = pa.schema([(name, pa.string()) for name in ("content", "caption")])
    with pytest.raises(StageError, match=r"\{captoin\?\}.*Did you mean caption\?"):
        stage(prompt="What? {captoin?}").bind(columns)


def test_presets_are_of_one_stage_or_the_other() -> None:
    with pytest.raises(ValidationError, match=r"preset rewrite is about text: .* recaption"):
        stage(preset="rewrite")
    with pytest.raises(ValidationError, match="max_tokens is 512: preset describe-structured"):
        stage(preset="describe-structured")
    assert stage().prompt.label.startswith("describe-dense@1 ")
    with pytest.raises(ValidationError, match="the prompt is empty"):
        stage(prompt=" ")


def test_what_a_model_sees_is_told_to_its_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    import stages.describe

    told: list[Any] = []
    monkeypatch.setattr(stages.describe, "open_engine", lambda *given: told.append(given[2]))
    stage(frames={"count": 5}).setup()
    stage(frames={"count": 5, "form": "video"}).setup()
    assert told == [{"image": 5}, {"video": 1}]
