"""Training on stored text embeddings."""

from __future__ import annotations

import sys
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from embedded import TEXT, embedding
from safetensors.torch import load_file

from manifests.shards import Index, ShardError
from trainer import models
from trainer.config import ModelConfig, SettingsError
from trainer.data import Batch, Loader
from trainer.prompts import text_of
from trainer.train import train

sys.path.insert(0, str(Path(__file__).parents[1] / "stages"))

from encoders import make as make_encoder

STORED = {"text": {"kind": "stored"}}
CAPTIONS = ["a red square", "a blue circle that moves left", "", None, "a red square"]


def captions(number: int) -> str | None:
    return CAPTIONS[number % 5]


def take(loader: Loader, count: int) -> list[Batch]:
    with closing(loader.batches(loader.start())) as batches:
        return list(islice(batches, count))


def test_a_visit_gets_its_captions_embedding_or_the_empty_ones(
    make_index: Any, settings_of: Any
) -> None:
    made = make_index(captions=captions, embedded=True)
    batches = take(Loader(made.open(), settings_of(made, caption_dropout=0.3, **STORED)), 42)
    dropped = 0
    for batch in batches:
        assert batch.embeddings is not None
        values, mask = batch.embeddings
        for clip, caption, one, there in zip(batch.clip_ids, batch.captions, values, mask):
            own = made.captions[clip] or ""
            assert caption in ("", own)
            dropped += caption != own
            wanted = embedding(caption)
            assert there.tolist() == [n < len(wanted) for n in range(len(there))]
            np.testing.assert_array_equal(one[there], wanted)
            assert not one[~there].any()
        assert mask.sum(1).max() == mask.shape[1], "no longer than the longest"
    assert 0.15 < dropped / (168 * 0.6) < 0.45  # of those with a caption


def test_training_on_them_goes_on_bit_for_bit(
    make_index: Any, settings_of: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = make_index(captions=captions, embedded=True)
    whole = train(settings_of(made, output=str(tmp_path / "whole"), **STORED))
    train(settings_of(made, steps=3, **STORED))
    parts = train(settings_of(made, steps=6, **STORED))
    one, other = (load_file(folder / "model.safetensors") for folder in (whole, parts))
    assert one["text.first.weight"].shape == (32, 6) and not any(
        "embed" in n for n in one if "text" in n
    )
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert "not used" not in capsys.readouterr().err
    train(settings_of(made, output=str(tmp_path / "words"), steps=1))
    assert "text embeddings, which are not used: train.text.kind" in capsys.readouterr().err


def test_the_text_decides_and_padding_does_not(make_index: Any, settings_of: Any) -> None:
    made = make_index(sizes=(4,), embedded=True)
    model, config = models.load(train(settings_of(made, steps=1, **STORED)))
    assert config.embeddings is not None and config.text.kind == "stored"
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
    x = torch.randn(1, 4, 4, 4, 4)
    time = torch.tensor([0.5])
    values = torch.tensor(embedding("a red square"))[None]
    longer = torch.cat([values, torch.full((1, 3, 6), 7.0)], 1)
    there = torch.arange(7)[None] < 4
    with torch.inference_mode():
        one = model(x, time, (values, torch.ones(1, 4, dtype=torch.bool)))
        torch.testing.assert_close(model(x, time, (longer, there)), one, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(model(x, time, (longer, ~there)), one, atol=1e-3)


# ----------------------------------------------------------------------------- what is refused


def test_an_index_without_them(make_index: Any, settings_of: Any) -> None:
    made = make_index()
    with pytest.raises(ShardError, match="the index has no text embeddings: add the section"):
        Loader(made.open(), settings_of(made, **STORED))


def test_a_clip_without_one(make_index: Any, settings_of: Any) -> None:
    made = make_index(embedded=True)
    index = made.open()
    number = index.table.column_names.index("text_key")
    keys = [None, *index.table.column("text_key").to_pylist()[1:]]
    table = index.table.set_column(number, "text_key", pa.array(keys, pa.string()))
    other = Index(index.workdir, table, index.spec, index.facts)
    with pytest.raises(ShardError, match=r"1 clips .* no text embedding, clip0+ among"):
        Loader(other, settings_of(made, **STORED))


def test_another_captions_embedding(make_index: Any, settings_of: Any) -> None:
    made = make_index(sizes=(4,), embedded=True)
    name = "embed/f/u00.parquet"
    table = pq.read_table(made.shards[name])
    keys = table.column("embedding_key").to_pylist()
    column = table.column_names.index("embedding_key")
    table = table.set_column(column, "embedding_key", pa.array([keys[1], keys[0], *keys[2:]]))
    pq.write_table(table, made.shards[name])
    with pytest.raises(ShardError) as error:
        take(Loader(made.open(), settings_of(made, **STORED)), 1)
    for part in (name, keys[0], keys[1], "do not belong together"):
        assert part in str(error.value)


def test_captions_by_weight_are_not_stored(make_index: Any, settings_of: Any) -> None:
    with pytest.raises(SettingsError, match="embeddings are of one caption a clip"):
        settings_of(make_index(sizes=(1,)), captions={"short": 1}, **STORED)


# ----------------------------------------------------------------------------- prompts


def config_of(folder: Path, **text: Any) -> ModelConfig:
    values = {**TEXT.to_json(), "encoder": str(folder), "width": 16, **text}
    return ModelConfig.model_validate(
        {
            "model": {"width": 32, "depth": 1, "heads": 2},
            "text": {"kind": "stored"},
            "objective": "flow",
            "schedule": "cosine",
            "shape": (4, 4, 4, 4),
            "latents": {},
            "embeddings": values,
        }
    )


@pytest.mark.parametrize("padding", ["none", "max_length"])
def test_prompts_are_embedded_as_captions_were(padding: str, tmp_path: Path) -> None:
    from stages.text_encoders import TextEncoder

    folder = make_encoder(tmp_path / "encoder", "umt5")
    stage = TextEncoder(str(folder), str(folder), max_length=12, padding=padding)  # type: ignore[arg-type]
    prompts = ["a red dog runs", "", "the small blue bird sits left"]
    values, there = text_of(prompts, config_of(folder, padding=padding))
    for one, mask, text in zip(values, there, stage.encode(prompts)):
        wanted = torch.frombuffer(bytearray(text.values), dtype=torch.float32).view(text.shape)
        torch.testing.assert_close(one[mask], wanted, atol=1e-5, rtol=0)


def test_an_encoder_that_is_not_there_or_another(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"can't be loaded.*--text-encoder"):
        text_of(["a"], config_of(tmp_path / "none"))
    folder = make_encoder(tmp_path / "encoder", "umt5", width=24)
    with pytest.raises(SettingsError, match=r"gives 24 values a token.*trained on 16"):
        text_of(["a"], config_of(folder))
