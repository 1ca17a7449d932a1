"""Made shards and an index over them, as the pipeline writes them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate.state import AcceleratorState
from embedded import TEXT, write_embeddings
from networks import make as make_network

from manifests.facts import with_facts
from manifests.shards import (
    FIRST_FRAME,
    INDEX,
    LATENTS,
    Index,
    LatentSpec,
    write_index,
)
from manifests.weights import folder_sha256
from trainer.config import TrainSettings, parse_settings
from trainer.families import FAMILIES

Shape = tuple[int, int, int, int]

SHAPE: Shape = (4, 4, 4, 4)
COLOURS = ("red", "green", "blue", "white")


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    """Models this small are slower on several threads."""
    torch.set_num_threads(1)


@dataclass(frozen=True)
class Made:
    """An index and what was put into it."""

    url: str
    spec: LatentSpec
    clips: dict[str, tuple[np.ndarray, np.ndarray]]  # clip id to mean and log-variance
    captions: dict[str, str | None]
    shards: dict[str, Path]

    def open(self) -> Index:
        return Index.open(self.url)


@pytest.fixture
def make_index(tmp_path: Path) -> Callable[..., Made]:
    """Makes shards of the sizes given, rows in groups of three, float32 moments by default."""

    def make(
        sizes: tuple[int, ...] = (7, 5, 1, 8),
        shape: Shape | Callable[[int], Shape] = SHAPE,
        dtype: str = "float32",
        moments: bool = True,
        captions: Callable[[int], str | None] = lambda i: f"a {COLOURS[i % 4]} square, no {i}",
        mean: Callable[[int], float] = float,
        several: Callable[[int], dict[str, str] | None] = lambda i: None,
        embedded: bool = False,
        first_frame: bool = False,
        group: int = 3,
        vae: Path | None = None,
        encoder: Path | None = None,
        padding: str = TEXT.padding,
    ) -> Made:
        folder = tmp_path / "work"
        shape_of = shape if callable(shape) else lambda i: shape
        spec = LatentSpec(
            vae=str(vae or "vaes/tiny"),
            vae_class="AutoencoderKL",
            vae_sha256=folder_sha256(vae) if vae else "ab" * 32,
            fingerprint="f" * 16,
            moments=moments,
            channels=SHAPE[0],
            temporal=1,
            spatial=8,
            shift=[0.1 * c for c in range(SHAPE[0])],
            scale=[1.0 / (c + 1) for c in range(SHAPE[0])],
            sampling={"fps": 16.0, "frames": 4, "size": 32, "policy": "time"},
        )
        text = replace(TEXT, padding=padding)
        if encoder is not None:
            sha256 = folder_sha256(encoder)
            text = replace(text, encoder=str(encoder), encoder_sha256=sha256)
        draw = np.random.default_rng(7)
        clips, texts, shards, rows = {}, {}, {}, []
        number = 0
        for s, size in enumerate(sizes):
            name, stored = f"encode/f/u{s:02}.parquet", []
            for row in range(size):
                clip = f"clip{number:020}"
                own = shape_of(number)
                values = draw.normal(mean(number), 0.1, own).astype(np.float32)
                logvar = draw.normal(-2, 0.1, own).astype(np.float32)
                clips[clip], texts[clip] = (values, logvar), captions(number)
                data = np.concatenate([values, logvar]) if moments else values
                stored.append(
                    {
                        "clip_id": clip,
                        "latents": as_bytes(data, dtype),
                        "latents_shape": list(data.shape),
                        "latents_dtype": dtype,
                        "frame_times": [0.0],
                        "latents_fps": 16.0,
                        "window_start": 0.0,
                        "window_end": 0.25,
                    }
                )
                if first_frame:  # half of what it is in the clip
                    alone = as_bytes(data[:, :1] / 2, dtype)
                    shape_alone = [data.shape[0], 1, *data.shape[2:]]
                    stored[-1] |= {
                        "first_frame_latents": alone,
                        "first_frame_latents_shape": shape_alone,
                    }
                rows.append(
                    {
                        "clip_id": clip,
                        "caption": texts[clip],
                        "shard": name,
                        "row": row,
                        "shape": list(data.shape),
                        "captions": by_kind(several(number)),
                    }
                )
                number += 1
            shards[name] = folder / name
            shards[name].parent.mkdir(parents=True, exist_ok=True)
            extra = FIRST_FRAME if first_frame else ()
            schema = pa.schema([pa.field("clip_id", pa.string()), *LATENTS, *extra])
            table = with_facts(pa.Table.from_pylist(stored, schema), {"spec": spec.to_json()})
            pq.write_table(
                table, shards[name], row_group_size=group, compression="none", use_dictionary=False
            )
            if embedded:
                of = rows[len(rows) - size :]
                name = f"embed/f/u{s:02}.parquet"
                shards[name] = folder / name
                write_embeddings(shards[name], name, of, text)
        url = str(folder / "index.parquet")
        table = pa.Table.from_pylist(rows, INDEX)
        facts: dict[str, Any] = {"text": text.to_json()} if embedded else {}
        facts["first_frame"] = first_frame
        write_index(url, str(folder), [table], spec, facts)
        return Made(url, spec, clips, texts, shards)

    return make


def by_kind(texts: dict[str, str] | None) -> list[dict[str, str]] | None:
    return texts and [{"kind": kind, "text": text} for kind, text in texts.items()]


def as_bytes(values: np.ndarray, dtype: str) -> bytes:
    if dtype == "bfloat16":  # the upper half of a float32
        return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return values.astype(dtype).tobytes()


@pytest.fixture
def settings_of(tmp_path: Path) -> Callable[..., TrainSettings]:
    """Settings of a model that trains in milliseconds."""

    def settings(made: Made, **values: Any) -> TrainSettings:
        small = {
            "index": made.url,
            "output": str(tmp_path / "out"),
            "steps": 6,
            "batch_size": 4,
            "warmup": 2,
            "log_every": 1,
            "save_every": 3,
            "mixed_precision": "no",
            "model": {"width": 32, "depth": 1, "heads": 2, "patch": [2, 2, 2]},
            "text": {"layers": 1, "length": 12, "buckets": 256},
        }
        return parse_settings({**small, **values})

    return settings


@pytest.fixture(scope="session")
def network(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny pretrained network, each made once."""
    known: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in known:
            known[kind] = make_network(kind, tmp_path_factory.mktemp(kind) / FAMILIES[kind].part)
        return known[kind]

    return folder


@pytest.fixture(scope="session")
def vae(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny VAE of pictures."""
    import diffusers

    torch.manual_seed(0)
    made = diffusers.AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(4, 4, 4, 4),
        layers_per_block=1,
        norm_num_groups=2,
        latent_channels=4,
    )
    folder = tmp_path_factory.mktemp("vae")
    made.save_pretrained(folder)
    return folder


@pytest.fixture
def precision_anew() -> Iterator[None]:
    """accelerate keeps one for all of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
