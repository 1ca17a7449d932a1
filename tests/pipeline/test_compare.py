"""`vidpipe captions compare`: two sides on the same clips, and a page that lets nothing in."""

from __future__ import annotations

import base64
import io
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from pipeline import config, dag
from pipeline.commands import captions as cli_captions
from pipeline.compare import THUMBNAILS, Shown, Told, Written, compare, sample, shown, side
from pipeline.compare_page import page
from pipeline.config import ConfigError
from pipeline.report import Reporter
from pipeline.run import run
from pipeline.unit import Retry
from stages.base import Failed, Rejected, StageError
from stages.captions.verdict import columns
from stages.demo.shapes import make_demo
from stages.recaption import Recaption

sys.path.insert(0, str(Path(__file__).parents[1] / "stages"))

YAML = """\
source: {kind: openvid, path: ./clips.csv, root: ./videos}
sampling: {fps: 16, frames: 8, size: 64}
recaption: {engine: transformers, model: "demo://captioner", device: cpu, max_tokens: 96}
encode: {enabled: false}
run: {runner: local, unit_size: 4, isolate: false}
"""


class Page(HTMLParser):
    """What a browser would make of it."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: Counter[str] = Counter()
        self.attributes: list[tuple[str, str, str]] = []
        self.open: list[str] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(html)
        self.close()
        assert not self.open, "all is closed again"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def all(self, tag: str) -> list[str]:
        return [text for where, text in self.texts if where == tag]

    def pictures(self) -> list[Image.Image]:
        head = "data:image/jpeg;base64,"
        urls = [value for tag, name, value in self.attributes if (tag, name) == ("img", "src")]
        assert all(url.startswith(head) for url in urls)
        return [Image.open(io.BytesIO(base64.b64decode(url.removeprefix(head)))) for url in urls]


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("project")
    make_demo(folder, 12)
    (folder / "vidpipe.yaml").write_text(YAML)
    pipeline = dag.build(config.load(str(folder / "vidpipe.yaml")))
    assert not run(pipeline, ["filter"], Retry(), Reporter()).faults
    return folder


@pytest.fixture
def here(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(project)
    return project


def test_two_prompts_side_by_side(here: Path) -> None:
    (here / "mine.yaml").write_text("{temperature: 0.9, quality: {retries: 0, max_words: 3}}")
    before = sorted((here / "work").rglob("*"))
    told = CliRunner().invoke(
        cli_captions.captions, ["compare", "current", "mine.yaml", "--n", "5", "--out", "a/b.html"]
    )
    assert told.exit_code == 0, told.output
    assert told.stdout == "a/b.html\n"
    assert "current: 5 of 5 clips" in told.stderr and "mine.yaml: 5 of 5 clips" in told.stderr
    assert sorted((here / "work").rglob("*")) == before, "the workdir stays as it is"
    found = Page((here / "a" / "b.html").read_text())
    assert found.tags["article"] == 5 and found.tags["img"] == 5 * THUMBNAILS.count
    sizes = {picture.size for picture in found.pictures()}
    assert sizes and max(map(max, sizes)) <= THUMBNAILS.side
    # What stands there is what the stage writes.
    sides = [side("vidpipe.yaml", (), named, None) for named in ("current", "mine.yaml")]
    rows = sample(sides[0], sides[1], 5)
    engine = sides[0].stage.setup()
    for one, flagged in zip(sides, (0, 5)):
        outcomes = one.stage.process(rows, engine)
        captions = [outcome["recaption"] for outcome in outcomes]
        assert set(captions) <= set(found.all("p"))
        assert sum(bool(outcome["recaption_flags"]) for outcome in outcomes) == flagged
    engine.close()
    assert {row["caption"] for row in rows} <= set(found.all("p"))
    totals = found.all("td")
    assert totals[4:6] == ["0 (0%)", "5 (100%)"], totals
    assert found.all("span") == ["too_long"] * 5


def test_the_same_clips_for_the_same_seed(here: Path) -> None:
    one = side("vidpipe.yaml", (), "current", None)
    ids = [[row["clip_id"] for row in sample(one, one, 5, seed)] for seed in (0, 0, 1)]
    assert ids[0] == ids[1] != ids[2]
    everyone = [row["clip_id"] for row in sample(one, one, 99)]
    assert everyone[:5] == ids[0] and len(set(everyone)) == len(everyone) > 8


def test_what_a_side_may_be(here: Path) -> None:
    def settings(named: str, *overrides: str) -> Recaption:
        stage = side("vidpipe.yaml", overrides, named, None).stage
        assert isinstance(stage, Recaption)
        return stage

    assert settings("current").prompt.name == "rewrite"
    assert settings("cogvideox-50-words").prompt.name == "cogvideox-50-words"
    (here / "prompt.txt").write_text("Say it again: {caption}\n")
    assert settings("prompt.txt").template.text == "Say it again: {caption}"
    mine = here / "over"
    mine.mkdir(exist_ok=True)
    (mine / "p.txt").write_text("Shorter: {caption}")
    (mine / "a.yaml").write_text("prompt_file: ./p.txt\nquality: {retries: 7}\nmax_tokens: 9")
    given = ("recaption.quality.min_words=4", "recaption.preset=vid_gen-45-words")
    both = settings("over/a.yaml", *given)
    assert both.template.text == "Shorter: {caption}", "in place of the preset"
    quality = both.settings.quality
    assert (quality.retries, quality.min_words, both.settings.max_tokens) == (7, 4, 9)
    assert both.settings.model == "demo://captioner"
    off = settings("current", "recaption.enabled=true")
    assert off.fingerprint == settings("current").fingerprint


@pytest.mark.parametrize(
    ("named", "text", "why"),
    [
        ("rewrit", None, r"rewrit is no preset \(.*rewrite.*\), not `current`, and no file"),
        ("gone.yaml", None, r"gone\.yaml can't be read"),
        ("a.yaml", "[1, 2]", "a mapping of the stage's settings is expected"),
        ("a.yaml", "a: [1", "no plain YAML"),
        ("a.yaml", "temprature: 1", "Did you mean temperature"),
        ("a.yaml", "{prompt: '{captoin}'}", r"\{captoin\}|'captoin' that nobody adds"),
        ("describe-dense", None, "is about frames: it is for the stage describe"),
    ],
)
def test_what_it_may_not_be(here: Path, named: str, text: str | None, why: str) -> None:
    if text:
        (here / named).write_text(text)
    with pytest.raises(ConfigError, match=why):
        side("vidpipe.yaml", (), named, None)


def test_before_anything_ran_it_says_what_to_run(tmp_path: Path) -> None:
    make_demo(tmp_path, 2)
    (tmp_path / "vidpipe.yaml").write_text(YAML)
    one = side(str(tmp_path / "vidpipe.yaml"), (), "current", None)
    with pytest.raises(
        ConfigError, match="no clip has come to recaption yet: `vidpipe run filter`"
    ):
        sample(one, one, 3)
    with pytest.raises(ConfigError, match="no stage writes captions here: name one, --stage"):
        side(str(tmp_path / "vidpipe.yaml"), ["recaption.enabled=false"], "current", None)


def test_one_engine_is_started_where_it_suits_both(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Recaption] = []
    setup = Recaption.setup
    monkeypatch.setattr(Recaption, "setup", lambda self: started.append(self) or setup(self))
    (here / "half.yaml").write_text("dtype: bfloat16")
    (here / "warm.yaml").write_text("temperature: 0.5")
    sides = [side("vidpipe.yaml", (), n, None) for n in ("current", "warm.yaml", "half.yaml")]
    rows = sample(sides[0], sides[1], 2)
    said: list[str] = []
    told = compare(sides, rows, lambda what, always: said.append(what))
    assert [stage.settings.dtype for stage in started] == ["auto", "bfloat16"]
    assert [len(one.written) for one in told] == [2, 2, 2]
    assert told[1].starting < told[0].starting
    assert all(each.seconds > 0 for one in told for each in one.written)
    assert all(one.amounts["tokens"] > 2 for one in told)


def test_models_that_see_are_compared_too(here: Path) -> None:
    from moody import Moody

    def reply(prompt: str, nth: int) -> str:
        return "I'm sorry, I can't." if "JSON" in prompt else "A disc moves over a dark ground."

    with Moody(reply=reply) as server:
        given = [
            f"describe.endpoints=[{server.url}]",
            "describe.engine=openai",
            "describe.max_tokens=800",
        ]
        names = ("describe-dense", "describe-structured")
        sides = [side("vidpipe.yaml", given, named, "describe") for named in names]
        rows = sample(sides[0], sides[1], 3)
        told = compare(sides, rows, lambda what, always: None)
        shown_to_it = [len(parts) for tries in server.shown.values() for parts, _ in tries]
    assert shown_to_it == [4] * (3 + 9), "nine for three tries of each that was refused"
    assert [one.flagged() for one in told] == [0, 3]
    found = Page(page(told, [shown(sides[0], row) for row in rows]))
    assert found.all("p").count("A disc moves over a dark ground.") == 3
    assert found.all("p").count("rejected: caption_bad_json") == 3
    assert "3 caption_bad_json" in found.all("td")


# ---------------------------------------------------------------------------- the page

EVIL = """<script>alert(1)</script>"><img src=x onerror=alert(2)>'&amp;<!-- </p> \u202e\x1b[31m"""


def outcome(caption: str, **more: object) -> dict[str, object]:
    values = dict.fromkeys(columns("recaption").names)
    given = {
        "recaption": caption,
        "recaption_raw": caption,
        "recaption_flags": [],
        "recaption_source": "model",
        "recaption_attempts": 1,
        "recaption_words": 3,
    }
    return {**values, **given, **more}


def test_strangers_text_is_text(tmp_path: Path) -> None:
    structured = [{"kind": EVIL, "text": EVIL}]
    told = Told(EVIL, EVIL, EVIL, "recaption", seconds=1.0)
    told.written = [
        Written(outcome(EVIL, recaption_flags=[EVIL], recaption_captions=structured), 0.1),
        Written(outcome("fine", recaption_raw=EVIL), 0.1),
        Written(Rejected(EVIL, EVIL), 0.1),
        Written(Failed(EVIL, EVIL), 0.1),
    ]
    row = {"clip_id": EVIL, "caption": EVIL, "start": None, "end": None}
    frames = np.zeros((2, 8, 8, 3), np.uint8)
    clips = [Shown(row, frames), *[Shown(row, None, EVIL)] * 3]
    html = page([told, told], clips)
    found = Page(html)
    assert not found.tags["script"] and found.tags["img"] == 2
    names = {name for _, name, _ in found.attributes}
    assert not [name for name in names if name.startswith("on")]
    said = EVIL.replace("\u202e", "\ufffd").replace("\x1b", "\ufffd")
    assert found.all("p").count(said) >= 4 * 1 + 2
    assert "\x1b" not in html and "\u202e" not in html
    policy = [value for tag, name, value in found.attributes if (tag, name) == ("meta", "content")]
    assert "default-src 'none'; img-src data:; style-src 'unsafe-inline'" in policy
    assert found.all("title") == [f"{said} / {said}: 4 clips"]


def test_a_clip_whose_frames_are_gone_says_so(here: Path) -> None:
    one = side("vidpipe.yaml", (), "current", None)
    (row,) = sample(one, one, 1)
    assert shown(one, row).frames is not None
    lost = shown(one, {**row, "path": str(here / "nothing.mp4")})
    assert (lost.frames, lost.fault) == (None, "the file is not there")


def test_an_engine_that_fails_closes_the_other(here: Path) -> None:
    (here / "gone.yaml").write_text(
        "{engine: openai, endpoints: ['http://127.0.0.1:9'], retries: 0}"
    )
    sides = [side("vidpipe.yaml", (), n, None) for n in ("current", "gone.yaml")]
    rows = sample(sides[0], sides[1], 1)
    with pytest.raises(StageError, match="no caption was had from the server"):
        compare(sides, rows, lambda what, always: None)
