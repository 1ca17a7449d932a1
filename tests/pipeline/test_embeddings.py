"""Text embeddings in the DAG: what stands where, what is made anew, what the index says."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from toys import Length, Limit, pipeline

from manifests.shards import LATENTS, Index, LatentSpec, ShardError, read_embeddings, read_latents
from pipeline import index
from pipeline.config import parse
from pipeline.dag import Pipeline, build
from pipeline.plan import status_and_amounts
from pipeline.report import Reporter
from pipeline.run import run
from pipeline.unit import Retry
from pipeline.upkeep.audit import audit
from pipeline.upkeep.repair import repair
from pipeline.upkeep.verify import verify
from stages.base import Outcome, Row, Stage, StageSettings
from stages.embed import Embed
from stages.text_encoders import TextEncoder

sys.path.insert(0, str(Path(__file__).parents[1] / "stages"))

from encoders import make

SPEC = LatentSpec("v", "AutoencoderKL", "", "f", False, 1, 1, 8, [0.0], [1.0])
CAPTIONS = ["a red dog", "a blue cat", "a red dog", None, "the bird", "a red dog"]


class Encode(Stage[StageSettings, str]):
    """Latents of four bytes, for clips that the gate let through."""

    name = "encode"
    Settings = StageSettings
    reads = ("uri",)
    adds = LATENTS
    after = ("limit",)

    def setup(self) -> str:
        return "a model"

    def metadata(self, model: str) -> dict[str, Any]:
        return {"spec": SPEC.to_json()}

    def process(self, rows: list[Row], model: str) -> list[Outcome]:
        made = dict.fromkeys(LATENTS.names) | {"latents_shape": [1, 1, 1, 1]}
        made |= {"latents_dtype": "float32", "frame_times": [0.0]}
        return [{**made, "latents": row["uri"][-4:].encode()} for row in rows]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make(tmp_path_factory.mktemp("t5") / "encoder", "umt5")


def made(
    folder: Path,
    encoder: Path,
    captions: Sequence[str | None],
    run: dict[str, Any] | None = None,
    **more: Any,
) -> Pipeline:
    settings = {"encoder": str(encoder), "dtype": "float32", "max_length": 16, **more}
    run = {"unit_size": 4, **(run or {})}
    return pipeline(folder, captions, [Encode, Embed], {"embed": settings}, run)


def go(made: Pipeline, *names: str) -> None:
    result = run(made, names, Retry(), Reporter())
    assert not result.faults, result.faults[0].trace
    found = audit(made).findings
    assert not found, found


def data_of(made: Pipeline, stage: str) -> list[str]:
    return [name for name in made.store.find(stage) if name.endswith(".parquet")]


def embeddings(made: Pipeline) -> dict[str, tuple[str | None, torch.Tensor]]:
    """By clip, as a trainer reads them: by place, and the key that must stand there."""
    opened = Index.open(index.path(made))
    found = {}
    for row in opened.table.to_pylist():
        (text,) = read_embeddings(opened.workdir, row["text_shard"], [row["text_row"]])
        assert text.key == row["text_key"] and text.tokens == text.shape[0]
        found[row["clip_id"]] = (row["caption"], tensor(text.data, text.shape))
    return found


def tensor(data: Any, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.float32).view(shape)


def test_the_index_says_where_each_clips_embedding_lies(tmp_path: Path, encoder: Path) -> None:
    one = made(tmp_path, encoder, CAPTIONS)
    go(one)
    model = TextEncoder(str(encoder), str(encoder), max_length=16)
    found = embeddings(one)
    assert sorted(str(caption) for caption, _ in found.values()) == sorted(map(str, CAPTIONS))
    for caption, values in found.values():
        (text,) = model.encode([caption or ""])
        wanted = tensor(text.values, text.shape)
        torch.testing.assert_close(values, wanted, atol=1e-5, rtol=0)
    opened = Index.open(index.path(one))
    spec = opened.text
    assert spec is not None and spec.encoder_class == "UMT5EncoderModel"
    assert (spec.max_length, spec.padding, spec.width, spec.column) == (16, "none", 16, "caption")
    empty = opened.empty_caption()
    (wanted_empty,) = model.encode([""])
    assert empty is not None and (empty.shape, empty.tokens) == ((1, 16), 1)
    wanted = tensor(wanted_empty.values, (1, 16))
    torch.testing.assert_close(tensor(empty.data, (1, 16)), wanted, atol=1e-5, rtol=0)


def encoded(made: Pipeline) -> int:
    """Captions that went through the encoder, the empty one among them, in all runs."""
    return status_and_amounts(made)[1]["embed"]["encoded"]


MANY = [
    f"a {color} {what}" for color in ("red", "green", "blue") for what in ("dog", "cat", "bird")
]


@pytest.mark.parametrize("isolate", [False, True])
def test_each_distinct_caption_is_encoded_once_over_units_and_runs(
    tmp_path: Path, encoder: Path, isolate: bool
) -> None:
    def go_on(captions: list[str]) -> Pipeline:
        one = made(tmp_path, encoder, captions, run={"isolate": isolate})
        go(one)
        return one

    one = go_on(MANY * 4)
    assert len(one.dag.log(one.store, "embed").units()) == 9
    assert encoded(one) == len(MANY) + 1
    go_on(MANY * 6)
    assert encoded(one) == len(MANY) + 1, "none of the new rows has a caption of its own"
    go_on(MANY * 6 + ["the small square", "a large circle"] * 5)
    assert encoded(one) == len(MANY) + 3
    amounts = status_and_amounts(one)[1]["embed"]
    assert amounts["copied"] >= len(MANY), "by the later runs"
    values: dict[str, torch.Tensor] = {}
    for caption, own in embeddings(one).values():
        assert torch.equal(values.setdefault(str(caption), own), own)
    assert len(values) == len(MANY) + 2


def test_workers_side_by_side_encode_no_caption_twice(
    tmp_path: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch, ray_address: str
) -> None:
    """Each gets the rows of some captions, of all units, whatever comes when."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    on_ray = {"runner": "ray", "address": ray_address, "isolate": True, "unit_size": 8}
    one = made(tmp_path, encoder, MANY * 6, run=on_ray, workers=2, cpus=0.5)
    go(one)
    log = one.dag.log(one.store, "embed")
    commits = [commit for unit in log.units() for commit in log.commits(unit)]
    assert len(log.units()) == 7 and len(commits) > 14, "units were cut"
    # The empty one, which no row has, each worker needs at its beginning.
    assert len(MANY) + 1 <= encoded(one) <= len(MANY) + 2
    values = [own for caption, own in embeddings(one).values() if caption == MANY[0]]
    assert len(values) == 6 and all(torch.equal(values[0], own) for own in values)


def test_with_no_room_to_remember_what_is_committed_is_copied(
    tmp_path: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stages.embed.REMEMBERED", 0)
    monkeypatch.setattr("stages.texts.LOOK_SECONDS", 0)
    monkeypatch.setattr("stages.texts.LOOK_SHARE", float("inf"))
    one = made(tmp_path, encoder, MANY * 4, run={"isolate": False})
    go(one)
    amounts = status_and_amounts(one)[1]["embed"]
    assert amounts["encoded"] == len(MANY) + 1 and amounts["copied"] > 0


def test_what_repair_has_made_void_is_encoded_anew(tmp_path: Path, encoder: Path) -> None:
    go(one := made(tmp_path, encoder, MANY[:4]))
    assert encoded(one) == 5
    (name,) = data_of(one, "embed")
    Path(one.store.path(name)).write_bytes(b"nothing of it is left")
    repair(one, list(verify(one, ["embed"])))
    go(made(tmp_path, encoder, MANY[:4]))
    assert encoded(one) == 10


def test_payload_stands_once_a_file(tmp_path: Path, encoder: Path) -> None:
    one = made(tmp_path, encoder, ["a red dog"] * 6 + ["a cat"])
    go(one)
    files = data_of(one, "embed")
    assert len(files) == 2, "of two units"
    tables = [pq.read_table(one.store.path(name)).to_pylist() for name in files]
    held = [[row["embedding_key"] for row in t if row["embedding"]] for t in tables]
    assert all(len(keys) == len(set(keys)) for keys in held)
    assert sum(map(len, held)) == 3, "the dog in both units, the cat in one"


def test_another_caption_is_embedded_anew_and_nothing_else_is(
    tmp_path: Path, encoder: Path
) -> None:
    one = made(tmp_path, encoder, CAPTIONS)
    go(one)
    before = embeddings(one)
    latents = data_of(one, "encode")
    files = set(data_of(one, "embed"))
    go(made(tmp_path, encoder, ["a green square", *CAPTIONS[1:]]))
    after = embeddings(one)
    changed = [clip for clip in before if before[clip][0] != after[clip][0]]
    assert len(changed) == 1 and after[changed[0]][0] == "a green square"
    for clip in set(before) - set(changed):
        assert torch.equal(before[clip][1], after[clip][1]), "whoever bore it first"
    (new,) = set(data_of(one, "embed")) - files
    assert pq.read_table(one.store.path(new)).num_rows == 1
    assert data_of(one, "encode") == latents


def test_another_length_makes_all_anew_and_leaves_latents(tmp_path: Path, encoder: Path) -> None:
    go(one := made(tmp_path, encoder, CAPTIONS))
    latents = data_of(one, "encode")
    go(other := made(tmp_path, encoder, CAPTIONS, max_length=2))
    assert one.stages["embed"].fingerprint != other.stages["embed"].fingerprint
    assert all(len(values) <= 2 for _, values in embeddings(other).values())
    assert data_of(one, "encode") == latents
    assert Index.open(index.path(other)).text.max_length == 2


def test_a_damaged_file_is_made_anew_whole(tmp_path: Path, encoder: Path) -> None:
    go(one := made(tmp_path, encoder, CAPTIONS))
    before = embeddings(one)
    name = data_of(one, "embed")[0]
    file = Path(one.store.path(name))
    data = bytearray(file.read_bytes())
    data[100] ^= 1
    file.write_bytes(data)
    assert audit(one).findings
    damages = list(verify(one, ["embed"]))
    assert damages
    repair(one, damages)
    go(made(tmp_path, encoder, CAPTIONS))
    after = embeddings(one)
    assert before.keys() == after.keys()
    for clip, (caption, values) in after.items():
        torch.testing.assert_close(values, before[clip][1], atol=1e-5, rtol=0)
        if caption == "a red dog":  # which the sound file has too
            assert torch.equal(values, before[clip][1])


def test_audit_finds_an_embedding_out_of_its_place(tmp_path: Path, encoder: Path) -> None:
    go(one := made(tmp_path, encoder, CAPTIONS))
    name = data_of(one, "embed")[0]
    file = Path(one.store.path(name))
    table = pq.read_table(file)
    rows = table.to_pylist()
    rows[0]["embedding"], rows[1]["embedding"] = rows[1]["embedding"], rows[0]["embedding"]
    rows[0]["embedding_key"], rows[1]["embedding_key"] = (
        rows[1]["embedding_key"],
        rows[0]["embedding_key"],
    )
    pq.write_table(table.from_pylist(rows, table.schema), file)
    said = " ".join(finding.what for finding in audit(one, quick=True).of("embed"))
    assert "another embedding in its place" in said


def test_a_row_without_payload_is_no_embedding(tmp_path: Path, encoder: Path) -> None:
    go(one := made(tmp_path, encoder, ["a red dog", "a red dog"]))
    (name,) = data_of(one, "embed")
    with pytest.raises(ShardError, match=r"has no embedding .* the index is stale"):
        list(read_embeddings(one.config.workdir, name, [1]))


def test_without_the_stage_the_index_has_no_text(tmp_path: Path) -> None:
    one = pipeline(tmp_path, ["a", "b"], [Length, Limit, Encode])
    go(one)
    opened = Index.open(index.path(one))
    assert opened.text is None and opened.empty_caption() is None
    assert opened.table.column("text_key").null_count == 2
    (latent,) = read_latents(opened.workdir, opened.table["shard"][0].as_py(), [0])
    assert latent.shape == (1, 1, 1, 1)


def test_it_is_in_the_dag_where_it_is_asked_for(tmp_path: Path, encoder: Path) -> None:
    text = (
        "source: {kind: folder, path: ./videos}\n"
        "recaption: {engine: transformers, model: 'demo://captioner'}\n"
    )
    file = str(tmp_path / "vidpipe.yaml")
    assert "embed" not in parse(text, file).stages
    asked = text + f"embed: {{encoder: {encoder}}}\n"
    one = build(parse(asked, file))
    assert {"recaption", "filter"} <= set(one.dag.ancestors["embed"])
    assert (
        one.stages["embed"].reads == ("recaption",) and "encode" not in one.dag.ancestors["embed"]
    )
    assert index.caption_column(one) == "recaption"
    assert index.needed(one) == ["encode", "recaption", "embed"]
    source = build(parse(asked, file, ["recaption.enabled=false"]))
    assert source.stages["embed"].reads == ("caption",)
    assert index.needed(source) == ["encode", "embed"]
    off = build(parse(asked, file, ["embed.enabled=false"]))
    assert "embed" not in off.stages
    named = build(parse(asked, file, ["embed.column=caption"]))
    assert index.caption_column(named) == "caption" and index.needed(named) == ["encode", "embed"]
    assert build(parse(text, file, [f"embed.encoder={encoder}"])).stages["embed"]
