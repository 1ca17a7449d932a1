from __future__ import annotations

import json
import pickle
from collections import Counter
from collections.abc import Callable, Generator
from typing import Any

import pyarrow as pa
import pytest
from pydantic import ValidationError

from stages.base import Context, Failed, Outcome, Rejected, StageError, counting
from stages.captions.prompt import FOLDER, Template, preset, presets
from stages.captions.verdict import read_parts
from stages.engines.base import Answer, EngineFailure, Request, Requests, Result, SamplingSettings
from stages.recaption import Recaption, RecaptionSettings

ORIGINAL = "a brown dog runs along the beach"
GOOD = "A brown dog runs along the beach."
BAD = "I'm sorry, I can't help."


class Scripted:
    """An engine that answers by a function of the request and how often the clip was asked."""

    label = "scripted@1"

    def __init__(self, answer: Callable[[str, int], Result]) -> None:
        self.answer = answer
        self.asked: list[tuple[int, Request]] = []
        self.sampling: SamplingSettings | None = None

    def stream(
        self, requests: Requests, sampling: SamplingSettings
    ) -> Generator[tuple[int, Result]]:
        """Takes up to three, answers the newest first, as an engine that batches may."""
        self.sampling = sampling
        held: list[tuple[int, Request]] = []
        while True:
            while len(held) < 3 and (one := next(requests, None)) is not None:
                held.append(one)
            if not held:
                return
            number, request = held.pop()
            times = sum(n == number for n, _ in self.asked)
            self.asked.append((number, request))
            yield number, self.answer(request.prompt, times + 1)

    def close(self) -> None:
        """Holds nothing."""


def make(**settings: Any) -> Recaption:
    known = {"engine": "openai", "endpoints": ["http://localhost:1"], "prompt": "{caption}"}
    if "preset" in settings:
        del known["prompt"]
    made = Recaption(RecaptionSettings(**{**known, **settings}), Context("/work"))
    return pickle.loads(pickle.dumps(made))


def said(text: str) -> Answer:
    return Answer(text, 5, False, 9)


def run(stage: Recaption, engine: Scripted, *captions: str | None) -> list[Outcome]:
    rows = [{"clip_id": str(i), "caption": c} for i, c in enumerate(captions)]
    outcomes = list(stage.process(rows, engine))
    kept = [o for o in outcomes if isinstance(o, dict)]
    assert pa.Table.from_pylist(kept, schema=stage.adds).num_rows == len(kept)
    return outcomes


def test_a_refused_answer_is_asked_for_again_with_a_seed_of_its_own() -> None:
    engine = Scripted(lambda prompt, times: said(GOOD if times == 3 else BAD))
    (outcome,) = run(make(), engine, ORIGINAL)
    assert (outcome["recaption"], outcome["recaption_source"]) == (GOOD, "model")
    assert (outcome["recaption_attempts"], outcome["recaption_flags"]) == (3, [])
    first, second, third = (request for _, request in engine.asked)
    assert len({first.seed, second.seed, third.seed}) == 3
    # Another seed changes no greedy answer: the further ones are drawn.
    assert [r.temperature for r in (first, second, third)] == [None, 0.7, 0.7]
    warm = Scripted(lambda prompt, times: said(BAD))
    run(make(temperature=1.1), warm, ORIGINAL)
    assert [r.temperature for _, r in warm.asked] == [None, 1.1, 1.1]


def test_the_same_again_whatever_comes_beside_it() -> None:
    def answer(prompt: str, times: int) -> Answer:
        return said(prompt if times > len(prompt) % 3 else BAD)

    captions = [f"{ORIGINAL} {'very ' * i}fast" for i in range(3)] + [ORIGINAL] * 4
    together = Scripted(answer)
    outcomes = run(make(), together, *captions)
    stage = make()
    for number, caption in enumerate(captions):
        row = {"clip_id": str(number), "caption": caption}
        alone = Scripted(answer)
        assert list(stage.process([row], alone)) == [outcomes[number]]
        assert [r for _, r in alone.asked] == [r for n, r in together.asked if n == number]


def test_what_never_passes_falls_back_to_the_original() -> None:
    engine = Scripted(lambda prompt, times: said(BAD))
    counted: Counter[str] = Counter()
    with counting(lambda what, n: counted.update({what: n})):
        (outcome,) = run(make(), engine, f" {ORIGINAL} ")
    assert (outcome["recaption"], outcome["recaption_source"]) == (ORIGINAL, "original")
    assert outcome["recaption_raw"] == BAD
    assert (outcome["recaption_flags"], outcome["recaption_attempts"]) == (["refusal"], 3)
    assert len(engine.asked) == 3
    assert counted == {"tokens": 15, "prompt_tokens": 27, "cached_tokens": 0} | {
        "asked_again": 2,
        "originals": 1,
    }


def test_or_the_clip_is_rejected_or_the_answer_kept() -> None:
    never = Scripted(lambda prompt, times: said(BAD))
    (rejected,) = run(make(quality={"fallback": "reject", "retries": 0}), never, ORIGINAL)
    assert isinstance(rejected, Rejected)
    assert rejected.reason == "caption_refusal"
    assert BAD[:20] in rejected.message
    (kept,) = run(make(quality={"fallback": "keep", "retries": 0}), never, ORIGINAL)
    assert (kept["recaption"], kept["recaption_flags"]) == (BAD, ["refusal"])
    (ignored,) = run(make(quality={"ignore": ["refusal"]}), never, ORIGINAL)
    assert (ignored["recaption"], ignored["recaption_attempts"]) == (BAD, 1)
    assert ignored["recaption_flags"] == ["refusal"]


def test_where_there_is_no_original_to_fall_back_to_the_clip_is_rejected() -> None:
    stage = make(prompt="{title}", quality={"retries": 0})
    row = {"clip_id": "a", "title": "Dog", "caption": None}
    (outcome,) = stage.process([row], Scripted(lambda prompt, times: said(BAD)))
    assert isinstance(outcome, Rejected)


def test_a_fault_of_the_engine_is_no_fault_of_the_caption() -> None:
    def answer(prompt: str, times: int) -> Result:
        return said(BAD) if times == 1 else EngineFailure("timeout", "no answer")

    (outcome,) = run(make(), Scripted(answer), ORIGINAL)
    assert outcome == Failed("timeout", "no answer"), "not the original, because of a busy server"


def test_an_opener_costs_no_further_answer() -> None:
    engine = Scripted(lambda prompt, times: said(f"Sure! Here is the caption: {GOOD}"))
    (outcome,) = run(make(), engine, ORIGINAL)
    assert (outcome["recaption"], outcome["recaption_attempts"]) == (GOOD, 1)
    assert outcome["recaption_raw"].startswith("Sure!")
    (strict,) = run(make(quality={"trim": False}), engine, ORIGINAL)
    assert (strict["recaption_source"], strict["recaption_flags"]) == ("original", ["meta"])


def test_thresholds_are_settings_and_change_the_fingerprint() -> None:
    text = "A brown dog runs along the beach and then on along the beach."
    engine = Scripted(lambda prompt, times: said(text))
    quality = {"max_words": 5, "retries": 0}
    (outcome,) = run(make(quality=quality), engine, ORIGINAL)
    assert outcome["recaption_flags"] == ["too_long"]
    assert outcome["recaption_words"] == 13
    assert outcome["recaption_overlap"] == 1.0
    assert make(quality=quality).fingerprint != make().fingerprint
    with pytest.raises(ValidationError, match="klingon is not known"):
        make(quality={"language": "klingon"})


def test_only_what_is_compared_is_read() -> None:
    assert make(prompt="{title}").reads == ("title", "caption")
    assert make(prompt="{title}", quality={"original": "title"}).reads == ("title",)
    alone = make(prompt="{title}", quality={"fallback": "keep", "min_overlap": 0})
    assert alone.reads == ("title",)
    columns = pa.schema([("title", pa.string()), ("caption", pa.string())])
    with pytest.raises(StageError, match=r"quality.original is captoin.*Did you mean caption\?"):
        make(quality={"original": "captoin"}).bind(columns)


# ---------------------------------------------------------------------------- presets

# A template that is changed is another version: this is where it shows.
VERSIONS = {
    "describe-dense": "describe-dense@1 6f684627dde5779f",
    "describe-structured": "describe-structured@1 e2cd4a35647ce0d3",
    "rewrite-described": "rewrite-described@1 a8e59fa0ca53d9a3",
    "cogvideox-50-words": "cogvideox-50-words@1 874429d417d3f922",
    "rewrite": "rewrite@1 642799837390333a",
    "structured": "structured@1 ba562a913251a39f",
    "vid_gen-45-words": "vid_gen-45-words@1 5bb806d3b25f3ddf",
}


def test_a_changed_preset_has_another_version() -> None:
    labels = {name: preset(name).label for name in presets()}
    assert labels == VERSIONS


REWRITES = [name for name in VERSIONS if not preset(name).sees]


@pytest.mark.parametrize("name", REWRITES)
def test_a_preset_is_asked_for_by_name(name: str) -> None:
    found = preset(name)
    about = "description" if name == "rewrite-described" else "caption"
    assert (found.name, found.template.columns) == (name, (about,))
    stage = make(preset=name, max_tokens=1024)
    rendered = stage.template.render({about: "a {dog}", "caption": "a {dog}"})
    assert isinstance(rendered, str)
    assert rendered.endswith(" a {dog}") and "{caption}" not in rendered


def test_a_hint_is_left_out_with_its_line_where_there_is_none() -> None:
    stage = make(preset="rewrite-described")
    assert stage.reads == ("description", "caption")
    assert stage.template.original == "description" == stage.original
    row = {"description": "A red ball {rolls}.", "caption": "ball"}
    full = stage.template.render(row)
    assert full.endswith("it: ball\nDescription: A red ball {rolls}.")
    for nothing in (None, " "):
        bare = stage.template.render({**row, "caption": nothing})
        assert bare.endswith("no notes.\n\nDescription: A red ball {rolls}.")
    assert stage.template.render({**row, "description": None}).reason == "empty_description"
    both = Template.parse("{caption} {caption?} {tag?}")
    assert (both.columns, both.hints) == (("caption",), ("tag",))
    assert both.render({"caption": "a", "tag": "b"}) == "a a b"


def test_a_description_is_what_its_rewrite_is_compared_with() -> None:
    engine = Scripted(lambda prompt, times: said(BAD))
    stage = make(preset="rewrite-described", quality={"retries": 0})
    row = {"clip_id": "a", "description": "A red ball rolls down a hill.", "caption": "no words"}
    (outcome,) = stage.process([row], engine)
    assert (outcome["recaption"], outcome["recaption_source"]) == (row["description"], "original")


def test_an_unknown_preset_is_refused_before_the_run() -> None:
    with pytest.raises(ValidationError, match=r"no preset structred\. Did you mean structured\?"):
        make(preset="structred")
    with pytest.raises(ValidationError, match="preset and prompt are both set: keep one"):
        RecaptionSettings(preset="rewrite", prompt="{caption}")


def test_the_preset_says_how_long_a_caption_may_be() -> None:
    engine = Scripted(lambda prompt, times: said("One dog runs. " + "Then it swims on. " * 17))
    (outcome,) = run(make(preset="rewrite", quality={"fallback": "keep"}), engine, ORIGINAL)
    assert "too_long" in outcome["recaption_flags"]


# ---------------------------------------------------------------------------- structured

PARTS = {
    "subject": "a brown dog",
    "motion": "runs along the water",
    "camera": "unknown",
    "setting": "a beach",
    "style": "live action",
    "short": "A brown dog runs on a beach.",
    "medium": "A brown dog runs along the water's edge of a beach, kicking up sand.",
    "long": "A brown dog runs along the water's edge of a wide beach. It kicks up sand, and waves "
    "roll in behind it.",
}


def structured(**settings: Any) -> Recaption:
    return make(preset="structured", max_tokens=768, **settings)


def test_a_structured_answer_is_several_captions() -> None:
    engine = Scripted(lambda prompt, times: said(f"```json\n{json.dumps(PARTS)}\n```"))
    (outcome,) = run(structured(), engine, ORIGINAL)
    assert outcome["recaption"] == PARTS["medium"]
    found = {c["kind"]: c["text"] for c in outcome["recaption_captions"]}
    assert {k: found[k] for k in ("short", "medium", "long")} == {
        k: PARTS[k] for k in ("short", "medium", "long")
    }
    assert json.loads(found["structured"])["subject"] == "a brown dog"
    assert found["original"] == ORIGINAL
    assert engine.sampling is not None
    assert engine.sampling.schema == json.loads((FOLDER / "structured.json").read_text())


@pytest.mark.parametrize(
    ("answer", "flags"),
    [
        (json.dumps(PARTS)[:-30], ["bad_json"]),
        (json.dumps({**PARTS, "mood": "x"}), ["bad_json"]),
        (json.dumps({**PARTS, "short": 3}), ["bad_json"]),
        (json.dumps({**PARTS, "long": " "}), ["bad_json"]),
        (json.dumps(list(PARTS)), ["bad_json"]),
        ("[" * 100_000, ["bad_json"]),
        (BAD, ["bad_json", "refusal"]),
        ("", ["empty", "bad_json"]),
        (json.dumps({**PARTS, "short": "The video begins with a brown dog."}), ["meta"]),
        (json.dumps({**PARTS, "long": BAD}), ["refusal"]),
    ],
)
def test_a_broken_one_is_asked_for_again(answer: str, flags: list[str]) -> None:
    def answers(prompt: str, times: int) -> Answer:
        return said(answer if times < 3 else json.dumps(PARTS))

    (outcome,) = run(structured(), Scripted(answers), ORIGINAL)
    assert (outcome["recaption"], outcome["recaption_attempts"]) == (PARTS["medium"], 3)
    never = Scripted(lambda prompt, times: said(answer))
    (fallen,) = run(structured(), never, ORIGINAL)
    assert fallen["recaption_flags"] == flags
    assert (fallen["recaption"], fallen["recaption_captions"]) == (ORIGINAL, None)


def test_thoughts_ahead_of_the_json_are_no_fault() -> None:
    text = f"<think>Hm {{}}.</think>\n{json.dumps(PARTS)}"
    assert read_parts(text, preset("structured")) == PARTS


def test_a_structured_answer_needs_room() -> None:
    with pytest.raises(ValidationError, match="max_tokens is 256: preset structured"):
        make(preset="structured")
