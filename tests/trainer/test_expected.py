"""What is refused, with both values named."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from manifests.facts import file_facts, with_facts
from manifests.shards import Index, ShardError
from trainer.config import Expect, SettingsError
from trainer.data import Loader
from trainer.expected import check_expected

BUCKETS = [
    {"frames": 17, "height": 64, "width": 96},
    {"frames": 17, "height": 96, "width": 64},
]


def told(made: Any, expect: Expect, text: Any = None, **sampling: Any) -> str:
    spec = made.spec
    spec = replace(spec, sampling={**spec.sampling, **sampling})
    with pytest.raises(SettingsError) as error:
        check_expected(expect, spec, text)
    return str(error.value)


def test_another_choice_of_frames(make_index: Any) -> None:
    made = make_index(sizes=(1,))
    found = told(made, Expect(policy="seed"))
    assert "train.expect.policy is seed, but the latents were made with time" in found
    found = told(made, Expect(fps=16), policy="interval", interval=4)
    assert "train.expect.fps is 16.0, but the latents were made with every frame of 4" in found
    found = told(made, Expect(policy="interval", interval=8), policy="interval", interval=4)
    assert "train.expect.interval is 8, but the latents were made with 4" in found
    assert "interval" not in told(made, Expect(interval=None, fps=24, policy="time"))


def test_buckets_are_compared_where_there_are_some(make_index: Any) -> None:
    made = make_index(sizes=(1,))
    found = told(made, Expect(frames=4, height=64), buckets=BUCKETS)
    assert "train.expect.frames is 4, but the latents were made with 17" in found
    assert "train.expect.height is 64, but the latents were made with buckets of 64, 96" in found
    found = told(made, Expect(buckets=((17, 64, 96),)), buckets=BUCKETS)
    assert "[[17, 64, 96]], but the latents were made with [[17, 64, 96], [17, 96, 64]]" in found
    own = replace(made.spec, sampling={**made.spec.sampling, "buckets": BUCKETS})
    check_expected(Expect(buckets=((17, 96, 64), (17, 64, 96)), frames=17), own)
    check_expected(Expect(buckets=((4, 32, 32),)), made.spec)


def test_another_text_encoder(make_index: Any) -> None:
    made = make_index(sizes=(1,), embedded=True)
    text = made.open().text
    check_expected(Expect(encoder="encoders/tiny", max_length=12), made.spec, text)
    check_expected(Expect(encoder=text.encoder_sha256), made.spec, text)
    found = told(made, Expect(encoder="other", max_length=77), text)
    assert "train.expect.encoder is other, but the embeddings were made with encoders" in found
    assert "train.expect.max_length is 77, but the embeddings were made with 12" in found
    assert "there are no text embeddings" in told(made, Expect(max_length=77))


def change(made: Any, name: str, **values: Any) -> None:
    """Has a shard say something else of what it holds."""
    path = made.shards[name]
    table = pq.read_table(path)
    spec = {**file_facts(table.schema)["spec"], **values}
    pq.write_table(with_facts(table, {"spec": spec}), path)


def read(made: Any, settings: Any) -> None:
    loader = Loader(made.open(), settings)
    with closing(loader.batches(loader.start())) as batches:
        list(islice(batches, 8))


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"vae_sha256": "ee" * 32}, ["vae_sha256 is " + "ee" * 32, "not " + "ab" * 32]),
        ({"scale": [2.0] * 4}, ["scale is [2.0, 2.0, 2.0, 2.0], not [1.0, 0.5"]),
        (
            {"fingerprint": "other", "sampling": {"fps": 8.0, "policy": "time"}},
            ["fingerprint is other, not ffff", "sampling.fps is 8.0, not 16.0"],
        ),
    ],
)
def test_a_shard_that_was_made_otherwise(
    values: dict[str, Any], parts: list[str], make_index: Any, settings_of: Any
) -> None:
    made = make_index()
    name = list(made.shards)[1]
    change(made, name, **values)
    with pytest.raises(ShardError) as error:
        read(made, settings_of(made))
    for part in (name, "`vidpipe run` makes the index anew", *parts):
        assert part in str(error.value)


def test_a_setting_without_effect_may_differ(make_index: Any, settings_of: Any) -> None:
    made = make_index()
    name = list(made.shards)[1]
    change(made, name, vae="moved/vae", sampling={**made.spec.sampling, "interval": 9})
    read(made, settings_of(made))


def test_a_shard_of_other_embeddings(make_index: Any, settings_of: Any) -> None:
    made = make_index(embedded=True)
    name = next(shard for shard in made.shards if shard.startswith("embed"))
    change(made, name, encoder_sha256="99" * 32, max_length=77)
    with pytest.raises(ShardError) as error:
        read(made, settings_of(made, text={"kind": "stored"}))
    for part in (name, "99" * 32, "cd" * 32, "max_length is 77, not 12"):
        assert part in str(error.value)


def test_shapes_that_its_vae_does_not_give(make_index: Any, settings_of: Any) -> None:
    made = make_index(sizes=(2,))
    index = made.open()
    column = index.table.column_names.index("shape")
    field = index.table.schema.field("shape")
    for shape in ([4, 4, 4, 4], [8, 4, 4]):
        shapes = pa.array([[8, 4, 4, 4], shape], field.type)
        table = index.table.set_column(column, field, shapes)
        other = Index(index.workdir, table, index.spec, {})
        with pytest.raises(ShardError) as error:
            Loader(other, settings_of(made))
        assert f"of shape {shape}" in str(error.value)
        assert "vaes/tiny gives 8 x frames x height x width" in str(error.value)
