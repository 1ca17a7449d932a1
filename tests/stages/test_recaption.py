from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Generator
from pathlib import Path

import pyarrow as pa
import pytest
from pydantic import ValidationError

from stages.base import Context, Failed, Rejected, StageError, counting
from stages.captions.prompt import Template
from stages.captions.verdict import clean, seed_of
from stages.engines.base import (
    Answer,
    EngineFailure,
    Request,
    Requests,
    Result,
    SamplingSettings,
)
from stages.recaption import Recaption, RecaptionSettings

CONTEXT = Context("/work")
COLUMNS = pa.schema([("clip_id", pa.string()), ("caption", pa.string()), ("fps", pa.float64())])


class Echo:
    """An engine that answers each prompt with itself, unless told otherwise."""

    label = "echo@1"

    def __init__(self, **answers: Result) -> None:
        self.answers = answers
        self.asked: list[list[Request]] = []

    def stream(
        self, requests: Requests, sampling: SamplingSettings
    ) -> Generator[tuple[int, Result]]:
        self.asked.append([])
        for one in requests:
            assert one is not None
            number, request = one
            self.asked[-1].append(request)
            yield number, self.answers.get(request.prompt, Answer(request.prompt, 3, False, 7))

    def close(self) -> None:
        """Holds nothing."""


def make(**settings: object) -> Recaption:
    """With every answer taken as it is: what quality control does is tests/stages/captions."""
    taken = {"retries": 0, "fallback": "keep"}
    settings = {
        "engine": "openai",
        "endpoints": ["http://localhost:1"],
        "quality": taken,
        **settings,
    }
    return pickle.loads(pickle.dumps(Recaption(RecaptionSettings(**settings), CONTEXT)))


# ---------------------------------------------------------------------------- templates


def test_the_default_prompt_reads_the_caption() -> None:
    stage = make()
    assert stage.reads == ("caption",)
    rendered = stage.template.render({"caption": " a {dog} "})
    assert rendered.endswith("Caption: a {dog}")


def test_a_template_fills_in_any_column() -> None:
    stage = make(prompt="{caption} at {fps} fps as {{json}}, {caption}\n")
    assert stage.reads == ("caption", "fps")
    row = {"caption": "{fps}", "fps": 29.97}
    assert stage.template.render(row) == "{fps} at 29.97 fps as {json}, {fps}"


@pytest.mark.parametrize(
    ("prompt", "why"),
    [
        ("no column", "names no column"),
        ("", "names no column"),
        ("{caption", "don't match"),
        ("caption} {caption}", "don't match"),
        ("{caption.__class__}", "name of a column and nothing else"),
        ("{caption[0]}", "name of a column and nothing else"),
        ("{caption!r}", "name of a column and nothing else"),
        ("{fps:.1f}", "name of a column and nothing else"),
        ("{}", "name of a column and nothing else"),
    ],
)
def test_a_bad_template_is_refused_before_the_run(prompt: str, why: str) -> None:
    with pytest.raises(StageError, match=why):
        Template.parse(prompt)
    with pytest.raises(ValidationError, match=why):
        RecaptionSettings(engine="transformers", prompt=prompt)


def test_an_unknown_column_is_refused_before_the_run() -> None:
    make(prompt="{fps} {caption}").bind(COLUMNS)
    with pytest.raises(StageError, match=r"\{captoin\}.*Did you mean caption\?"):
        make(prompt="{captoin}").bind(COLUMNS)


def test_a_prompt_may_come_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prompt.txt"
    file.write_text("Kürzer: {caption}\n", encoding="utf-8")
    from_file, inline = make(prompt_file=str(file)), make(prompt="Kürzer: {caption}")
    assert from_file.template == inline.template
    assert from_file.fingerprint == inline.fingerprint
    with pytest.raises(ValidationError, match=r"gone\.txt can't be read"):
        make(prompt_file=str(tmp_path / "gone.txt"))
    with pytest.raises(ValidationError, match="prompt and prompt_file are both set: keep one"):
        make(prompt="{caption}", prompt_file=str(file))


# ---------------------------------------------------------------------------- rows


@pytest.mark.parametrize(
    ("raw", "caption"),
    [
        ("  A dog \n\n runs.\t", "A dog runs."),
        ('"A dog runs."', "A dog runs."),
        ("“A dog runs.”", "A dog runs."),
        ("'\"A dog runs.\"'", "A dog runs."),
        ('"A dog" and "a cat"', '"A dog" and "a cat"'),
        ("'The dog's bowl'", "'The dog's bowl'"),
        ('A sign says "stop"', 'A sign says "stop"'),
        ("<think>Hm.\n</think>\n\nA dog.", "A dog."),
        ("<think>Hm, cut off", ""),
        ("", ""),
        ('"', '"'),
        ('""', ""),
        (" \n ", ""),
    ],
)
def test_an_answer_is_cleaned(raw: str, caption: str) -> None:
    assert clean(raw) == caption


def test_outcomes_stand_in_the_place_of_their_rows() -> None:
    engine = Echo(
        bad=EngineFailure("http_400", "no"),
        blank=Answer(' "" ', 2, False),
        long=Answer("A dog that", 9, True),
    )
    captions = [" 'fine' ", None, "bad", "  ", "blank", "long"]
    stage = make(prompt="{caption}")
    rows = [{"clip_id": str(i), "caption": c} for i, c in enumerate(captions)]
    fine, none, bad, empty, blank, long = stage.process(rows, engine)
    assert fine == {
        "recaption": "fine",
        "recaption_raw": "'fine'",
        "recaption_model": "echo@1",
        "recaption_prompt": stage.identity()["template"],
        "recaption_tokens": 3,
        "recaption_prompt_tokens": 7,
        "recaption_truncated": False,
        "recaption_source": "model",
        "recaption_attempts": 1,
        "recaption_flags": ["too_short"],
        "recaption_words": 1,
        "recaption_repetition": 0.0,
        "recaption_foreign": 0.0,
        "recaption_overlap": None,
        "recaption_captions": None,
    }
    assert [type(none), none.reason, empty.reason] == [Rejected, "empty_caption", "empty_caption"]
    assert bad == Failed("http_400", "no")
    assert [type(blank), blank.error] == [Failed, "empty_answer"]
    assert (long["recaption_truncated"], long["recaption_tokens"]) == (True, 9)
    assert pa.Table.from_pylist([fine, long], schema=stage.adds).num_rows == 2
    assert [r.prompt for r in engine.asked[0]] == ["'fine'", "bad", "blank", "long"]


def test_rows_without_a_caption_are_told_of_before_all_are_taken() -> None:
    taken = []

    def rows() -> Generator[dict[str, str]]:
        for number in range(5000):
            taken.append(number)
            yield {"clip_id": f"c{number}", "caption": "a dog" if number == 4000 else ""}

    outcomes = dict(zip(range(1), make().answers(rows(), Echo())))
    assert len(outcomes) == 1 and len(taken) <= 64
    engine = Echo()
    told = dict(make().answers(rows(), engine))
    assert sorted(told) == list(range(5000))
    assert [number for number, one in told.items() if isinstance(one, dict)] == [4000]
    assert [request.prompt.count("a dog") for asked in engine.asked for request in asked] == [1]


def test_tokens_are_counted() -> None:
    counted: Counter[str] = Counter()
    engine = Echo(a=Answer("x", 5, False, 9, 4), b=Answer("x", None, False))
    rows = [{"clip_id": c, "caption": c} for c in ("a", "b", "c")]
    with counting(lambda what, n: counted.update({what: n})):
        make(prompt="{caption}").process(rows, engine)
    assert counted == {"tokens": 8, "prompt_tokens": 16, "cached_tokens": 4}


def test_without_a_caption_the_engine_is_not_asked() -> None:
    engine = Echo()
    (outcome,) = make().process([{"clip_id": "a", "caption": ""}], engine)
    assert outcome.reason == "empty_caption"
    assert engine.asked == [[]]


def test_each_clip_has_its_own_seed() -> None:
    seeds = {seed_of(s, c) for s in (0, 1) for c in ("a", "b")}
    assert len(seeds) == 4
    assert all(0 <= seed < 2**31 for seed in seeds)
    engine = Echo()
    rows = [{"clip_id": c, "caption": "x"} for c in ("a", "b")]
    make().process(rows, engine)
    make().process(rows[::-1], engine)
    there, back = engine.asked
    assert there == back[::-1]


# ---------------------------------------------------------------------------- settings


def test_only_what_changes_results_is_in_the_fingerprint() -> None:
    base = make().fingerprint
    same = [
        make(endpoints=["http://a", "http://b"], concurrency=1, timeout=1, retries=0, backoff=0),
        make(api_key_env="SOME_KEY", device="cpu", batch_size=3, workers=2, gpus=1),
        make(engine_args={"tensor_parallel_size": 4, "gpu_memory_utilization": 0.5}),
    ]
    assert [stage.fingerprint for stage in same] == [base] * 3
    others = [
        make(model="other/model"),
        make(revision="abc"),
        make(prompt="{caption}!"),
        make(max_tokens=9),
        make(temperature=0.5),
        make(top_p=0.5),
        make(seed=1),
        make(dtype="float16"),
        make(template_args={}),
        make(max_model_len=100),
        make(engine_args={"quantization": "fp8"}),
        make(engine="transformers"),
        make(preset="vid_gen-45-words"),
        make(quality={"retries": 1, "fallback": "keep"}),
        make(quality={"retries": 0, "fallback": "keep", "original": "title"}),
    ]
    assert len({base, *(stage.fingerprint for stage in others)}) == len(others) + 1


def test_no_engine_is_asked_for_a_temperature_that_it_refuses() -> None:
    """vLLM and OpenAI take none over 2."""
    for settings in ({"temperature": 2.1}, {"quality": {"retry_temperature": 2.1}}):
        with pytest.raises(ValidationError, match="less than or equal to 2"):
            RecaptionSettings(engine="transformers", **settings)


def test_json_of_vllm_is_another_since_it_is_compact() -> None:
    settings = {"preset": "structured", "max_tokens": 1000, "model": "demo://captioner"}
    assert make(engine="vllm", **settings).identity()["settings"]["json"] == "compact"
    assert "json" not in make(engine="transformers", **settings).identity()["settings"]
    assert "json" not in make(engine="vllm").identity()["settings"]


def test_the_key_stays_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = make(api_key_env="VIDPIPE_TEST_KEY")
    monkeypatch.delenv("VIDPIPE_TEST_KEY", raising=False)
    with pytest.raises(StageError, match="VIDPIPE_TEST_KEY, which is not set"):
        stage.check()
    monkeypatch.setenv("VIDPIPE_TEST_KEY", "hunter2")
    stage.check()
    assert b"hunter2" not in pickle.dumps(stage)
    assert "hunter2" not in str(stage.identity())


def test_what_is_missing_is_named_before_the_run(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match="needs endpoints"):
        RecaptionSettings(engine="openai")
    with pytest.raises(StageError, match="there is no folder"):
        make(engine="transformers", model=str(tmp_path / "gone")).check()
    with pytest.raises(StageError, match=r"no config\.json"):
        make(engine="transformers", model=str(tmp_path)).check()


def test_without_vllm_the_remedy_is_told() -> None:
    try:
        import vllm  # noqa: F401
    except ImportError:
        with pytest.raises(StageError, match=r"pip install 'vidpipe\[vllm\]'"):
            make(engine="vllm").check()
    else:
        pytest.skip("vllm is installed")


def test_a_password_and_a_key_are_not_both_for_one_header() -> None:
    named = ["http://a", "http://user:hunter2@b/v1"]
    make(endpoints=named)
    with pytest.raises(ValidationError, match="one Authorization header") as refused:
        make(endpoints=named, api_key_env="VIDPIPE_TEST_KEY")
    assert "hunter2" not in refused.value.errors(include_input=False)[0]["msg"]


def test_engines_that_need_one_ask_for_a_gpu() -> None:
    assert make(engine="vllm").accelerated
    assert make(engine="transformers").accelerated
    assert not make(engine="transformers", device="cpu").accelerated
    assert not make(engine="openai").accelerated
