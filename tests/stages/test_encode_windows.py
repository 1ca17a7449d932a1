"""Clips split into windows by a real run: the account, the captions, the index, the latents."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numbered import make

from manifests.schema import child_id, clip_id
from manifests.shards import Index, read_latents
from pipeline import account, config, dag, index, query
from pipeline.plan import plan
from pipeline.report import Reporter
from pipeline.run import Result, run
from pipeline.unit import Retry
from pipeline.upkeep import audit
from stages.base import Context, StageError
from stages.encode import Encode, EncodeSettings
from stages.media.sampling import Sampling

YAML = """\
workdir: ./work
source: {kind: jsonl, path: clips.jsonl}
sampling: {fps: 8, frames: 8, size: 32, windows: all}
score: {frames: 1, side: 32}
recaption: {engine: transformers, model: "demo://captioner"}
encode: {vae: "demo://vae"}
run: {runner: local, isolate: false}
"""
CLIPS: list[dict[str, Any]] = [
    {"path": "long.mp4", "text": "a red circle moves left"},  # 4.4 s: four windows
    {"path": "long.mp4", "text": "a blue square moves right", "start": 1.2, "end": 3.4},  # two
    {"path": "exact.mkv", "text": "a green triangle grows"},  # one
    {"path": "short.mp4", "text": "a red circle grows"},  # none
    {"path": "broken.mp4", "text": "a red circle shrinks"},
    {"path": "late.ts", "text": None},  # two, that nobody says anything of
]
PROMPT = "recaption.prompt='Say it well: {caption}'"
WINDOWS = {0: 4, 1: 2, 2: 1, 5: 2}


def build(folder: Path, *overrides: str, clips: list[dict[str, Any]] = CLIPS) -> dag.Pipeline:
    table, text = folder / "clips.jsonl", "".join(json.dumps(clip) + "\n" for clip in clips)
    if not table.exists() or table.read_text() != text:
        table.write_text(text)
    (folder / "vidpipe.yaml").write_text(YAML)
    return dag.build(config.load(str(folder / "vidpipe.yaml"), overrides))


def films(folder: Path) -> None:
    make(folder / "long.mp4", 110, 25, bf="2", g="12")
    make(folder / "exact.mkv", 25, 25)
    make(folder / "short.mp4", 10, 25)
    make(folder / "late.ts", 60, pts=[3000 + 40 * i for i in range(60)])
    path = make(folder / "broken.mp4", 60, 25)
    path.write_bytes(path.read_bytes()[:900])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dag.Pipeline, Result]:
    folder = tmp_path_factory.mktemp("windows")
    films(folder)
    pipeline = build(folder)
    return folder, pipeline, run(pipeline, (), Retry(), Reporter())


def select(pipeline: dag.Pipeline) -> list[dict[str, Any]]:
    return query.select(pipeline, None).to_pylist()


def indexed(pipeline: dag.Pipeline) -> dict[str, np.ndarray]:
    """The latents of every clip of the index."""
    opened = Index.open(index.path(pipeline))
    found = {}
    for row in opened.table.to_pylist():
        (latent,) = read_latents(opened.workdir, row["shard"], [row["row"]])
        assert latent.clip_id == row["clip_id"]
        found[row["clip_id"]] = np.frombuffer(latent.data, np.float32).reshape(latent.shape)
    return found


def test_a_clip_is_one_in_the_account_however_many_windows_it_has(
    made: tuple[Path, dag.Pipeline, Result],
) -> None:
    _, pipeline, result = made
    assert not result.faults
    told = {stage["name"]: stage for stage in account.account(pipeline)["stages"]}
    assert all(
        s["in"]
        == s["kept"] + sum(s["rejected"].values()) + sum(s["failed"].values()) + s["pending"]
        for s in told.values()
    )
    assert (told["encode"]["in"], told["encode"]["kept"]) == (5, 4)
    assert told["encode"]["rejected"] == {"too_short": 1}
    assert told["recaption"]["in"] == 5, "of clips, not of windows"
    found = audit.audit(pipeline)
    assert not found.findings and not found.notes
    assert found.indexed == 7


def test_each_window_is_a_row_with_its_clips_columns(
    made: tuple[Path, dag.Pipeline, Result],
) -> None:
    rows = select(made[1])
    assert len(rows) == sum(WINDOWS.values()) + 2
    captions = {row["source_text"] if "source_text" in row else row["caption"] for row in rows}
    assert captions == {clip["text"] for clip in CLIPS}
    for number, count in WINDOWS.items():
        own = [row for row in rows if row["caption"] == CLIPS[number]["text"]]
        assert len(own) == count
        starts = sorted(row["window_start"] for row in own)
        first = CLIPS[number].get("start", 0.0)
        assert starts == pytest.approx([first + i for i in range(count)], abs=0.04)
        for row in own:
            assert row["window_end"] - row["window_start"] == pytest.approx(1.0, abs=0.04)
            assert (row["latents_fps"], len(row["frame_times"]), row["len"]) == (8.0, 8, 8)
            assert row["frame_times"][0] == pytest.approx(row["window_start"], abs=0.04)
        assert len({row["clip_id"] for row in own}) == count
        assert len({row["sharpness"] for row in own}) == 1


def test_every_window_is_in_the_index_with_its_clips_caption(
    made: tuple[Path, dag.Pipeline, Result],
) -> None:
    _, pipeline, _ = made
    rows = select(pipeline)
    windows = {}
    for row in rows:
        clip = clip_id(row["uri"], row["start"], row["end"])
        windows[child_id(clip, row["window_start"], row["window_end"])] = row
    table = Index.open(index.path(pipeline)).table.to_pylist()
    assert len(table) == 7
    for row in table:
        assert row["caption"] and row["caption"] == windows[row["clip_id"]]["recaption"]
    assert len(indexed(pipeline)) == 7


def test_the_second_run_does_nothing(made: tuple[Path, dag.Pipeline, Result]) -> None:
    folder, pipeline, _ = made
    before = pipeline.store.find("")
    again = build(folder)
    assert not run(again, (), Retry(), Reporter()).ran
    assert again.store.find("") == before
    todo = plan(again, list(again.stages))
    assert todo.empty


def test_a_new_prompt_and_a_new_clip_leave_the_other_windows(
    made: tuple[Path, dag.Pipeline, Result], tmp_path: Path
) -> None:
    films(tmp_path)
    pipeline = build(tmp_path)
    run(pipeline, (), Retry(), Reporter())
    first = indexed(pipeline)
    assert first.keys() == indexed(made[1]).keys(), "ids don't depend on the folder"
    more = [*CLIPS, {"path": "long.mp4", "text": "a square", "start": 2.0}]
    pipeline = build(tmp_path, PROMPT, clips=more)
    result = run(pipeline, (), Retry(), Reporter())
    assert result.status["encode"].kept == 5
    after = indexed(pipeline)
    assert len(after) == 9
    assert all(np.array_equal(after[clip], latents) for clip, latents in first.items())
    assert not audit.audit(pipeline).findings
    assert not run(build(tmp_path, PROMPT, clips=more), (), Retry(), Reporter()).ran


def test_a_window_is_encoded_as_that_part_of_the_video_would_be(
    made: tuple[Path, dag.Pipeline, Result], tmp_path: Path
) -> None:
    rows = [r for r in select(made[1]) if r["outcome"] == "kept"]
    films(tmp_path)
    spans = [(row["uri"], row["window_start"], row["window_end"]) for row in rows]
    clips = [
        {"path": uri, "text": str(n), "start": start, "end": end}
        for n, (uri, start, end) in enumerate(spans)
    ]
    pipeline = build(tmp_path, "sampling.windows=1", "recaption.enabled=false", clips=clips)
    assert not pipeline.dag.layers["encode"].splits
    run(pipeline, (), Retry(), Reporter())
    split, alone = indexed(made[1]), indexed(pipeline)
    texts = {row["clip_id"]: int(row["caption"]) for row in select(pipeline)}
    compared = 0
    for clip, latents in alone.items():
        window = rows[texts[clip]]["clip_id"]
        if window in split:
            assert np.array_equal(split[window], latents)
            compared += 1
    assert compared == 7


def test_a_random_start_depends_on_the_clip_alone(tmp_path: Path) -> None:
    """Not on the order of the table, on batches or on how many clips there are."""
    random = ("sampling.windows=1", "sampling.start=random", "recaption.enabled=false")
    found = []
    for name, clips, more in (
        ("one", CLIPS, ()),
        ("other", CLIPS[::-1], ("encode.batch_size=3", "encode.threads=2")),
        ("few", CLIPS[:2], ("run.unit_size=1",)),
    ):
        folder = tmp_path / name
        folder.mkdir()
        films(folder)
        pipeline = build(folder, *random, *more, clips=clips)
        run(pipeline, (), Retry(), Reporter())
        found.append({r["clip_id"]: r["frame_times"] for r in select(pipeline) if r["frame_times"]})
    one, other, few = found
    assert len(one) == 4 and one == other
    assert few.items() <= one.items() and len(few) == 2
    starts = [times[0] for times in one.values()]
    assert len(set(starts)) == 4 and max(starts) > 0.5


def stage(folder: str = "/w", **sampling: Any) -> Encode:
    return Encode(EncodeSettings(), Context(folder, sampling=Sampling(**sampling)))


def test_what_decides_the_frames_is_in_the_fingerprint() -> None:
    plain = stage().fingerprint
    assert plain == stage(interval=7).fingerprint, "of another policy"
    fast = stage(policy="interval", fps=99).fingerprint
    assert fast == stage(policy="interval").fingerprint != plain
    bucketed = [[17, 64, 64]]
    assert stage(buckets=bucketed, size=99).fingerprint == stage(buckets=bucketed).fingerprint
    different = [
        {},
        {"start": "center"},
        {"start": "random"},
        {"windows": 2},
        {"windows": "all"},
        {"policy": "seed"},
        {"policy": "interval"},
        {"policy": "interval", "interval": 2},
        {"buckets": bucketed},
        {"short": "pad"},
    ]
    assert len({stage(**each).fingerprint for each in different}) == len(different)
    assert [stage(**each).splits for each in different[:6]] == [False] * 3 + [True] * 2 + [False]
    assert not Encode.splits


def test_every_bucket_is_checked_against_the_vae(tmp_path: Path) -> None:
    config = {"_class_name": "AutoencoderKLWan", "temperal_downsample": [False, True, True]}
    (tmp_path / "config.json").write_text(json.dumps({**config, "dim_mult": [1, 2, 4, 4]}))
    settings = EncodeSettings(vae=str(tmp_path))

    def check(*buckets: tuple[int, int, int]) -> None:
        Encode(settings, Context("/w", sampling=Sampling(buckets=buckets))).check()

    check((17, 64, 64), (33, 64, 96))
    with pytest.raises(StageError, match=r"set sampling\.buckets\.1\.frames to 29 or 33"):
        check((17, 64, 64), (32, 64, 96))
    with pytest.raises(StageError, match=r"set sampling\.buckets\.0\.width to 64"):
        check((17, 64, 60), (33, 64, 96))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sampling.buckets=[[17, 64]]", r"a bucket is \[frames, height, width\]"),
        ("sampling.buckets=[{frames: 17, height: 64, with: 64}]", "buckets.0.width` is missing"),
        ("sampling.buckets=[[17, 64, 0]]", "sampling.buckets.0.width"),
        ("sampling={buckets: [[17, 64, 64]], short: pad}", "leave one of them out"),
        ("sampling.windows=0", "`sampling.windows`: 0 is neither a number from 1 on nor `all`"),
        ("sampling.windows=some", "'some' is neither"),
    ],
)
def test_a_mistake_is_told(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(config.ConfigError, match=said):
        build(tmp_path, text)
