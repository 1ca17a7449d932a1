"""embed: text embeddings of the captions to train on, each distinct caption once.

A row holds the key of its embedding: a hash of the caption and of all that made it. The embedding
itself stands once in a data file, in the row that `embedding_row` names, however many captions of
the file are equal; so every file can be read, verified and made anew by itself. What is committed
in one file is copied into others that need it (`stages.texts`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import Field

from manifests.joins import array
from manifests.schema import did_you_mean
from manifests.shards import EMBEDDINGS, TextSpec
from manifests.stored import StoredEmbeddings
from stages.base import (
    Failed,
    Named,
    Outcome,
    Resources,
    Row,
    Speed,
    Stage,
    StageError,
    StageSettings,
)
from stages.devices import check_device
from stages.models import check, folder_sha256, model_identity, root
from stages.text_encoders import Text, TextEncoder, key_of, kind_of
from stages.texts import Texts

# Bytes of embeddings that a worker keeps for captions that come again.
REMEMBERED = 512 << 20
# Rows given to process: enough to put captions of a length together, few enough for the memory.
ROWS, ROWS_BYTES = 256, 256 << 20
WIDE = 4096  # values of a token of the largest encoders
_PAYLOAD = ("embedding", "embedding_pooled")
# The parts of a diffusers pipeline that are no text encoder.
_OTHERS = ["transformer*/*", "unet*/*", "vae*/*", "image_encoder*/*", "scheduler/*", "assets/*"]


class EmbedSettings(StageSettings):
    encoder: Named[str] = Field(
        "google/umt5-xxl", description="folder or hub id of a T5, umT5 or CLIP text encoder"
    )
    revision: Named[str | None] = Field(None, description="of a hub id: branch, tag or commit")
    subfolder: Named[str | None] = Field(
        None, description="of the encoder; default: text_encoder in a diffusers pipeline"
    )
    tokenizer: Named[str | None] = Field(
        None, description="subfolder of the tokenizer; default: tokenizer in a diffusers pipeline"
    )
    column: str | None = Field(
        None, description="of the captions; default: recaption, else description, else caption"
    )
    max_length: int = Field(512, ge=1, le=8192, description="tokens; what is longer is cut off")
    padding: Literal["none", "max_length"] = Field(
        "none",
        description="none: a caption's own tokens, as Wan; max_length: padded and not masked, as "
        "CogVideoX, LTX and Stable Diffusion",
    )
    dtype: Literal["bfloat16", "float16", "float32"] = Field(
        "bfloat16", description="of the encoder and of the embeddings as stored"
    )
    device: Speed[str] = Field("auto", description="auto, cpu, cuda, cuda:1, ...")


class Embed(Stage[EmbedSettings, Texts]):
    """Text embeddings (`manifests.shards.EMBEDDINGS`), ahead of training."""

    name = "embed"
    Settings = EmbedSettings
    adds = EMBEDDINGS
    after = ("filter",)
    on_request = True
    once = True
    default_time_limit = 900.0
    default_resources = Resources(cpus=1)

    @property
    def column(self) -> str:
        return self.settings.column or self.context.captions

    @property
    def reads(self) -> tuple[str, ...]:  # type: ignore[override]
        return (self.column,)

    @property
    def batch_size(self) -> int:
        """Rows given to process: several batches, so that captions of a length are together."""
        size = self.settings.max_length * WIDE * (4 if self.settings.dtype == "float32" else 2)
        return max(self._batch, min(ROWS, ROWS_BYTES // size))

    @property
    def _batch(self) -> int:
        return self.settings.batch_size or self.default_batch

    @property
    def accelerated(self) -> bool:
        return self.settings.device.startswith(("auto", "cuda"))

    def identity(self) -> dict[str, Any]:
        values = super().identity()
        del values["settings"]["column"]  # it is in `reads`
        return {**values, **self._models()}

    def encoder(self) -> dict[str, Any]:
        """All that decides a caption's embedding, whatever column it is in."""
        s = self.settings
        how = {"max_length": s.max_length, "padding": s.padding, "dtype": s.dtype}
        return {**how, **self._models(), "version": self.version}

    def _models(self) -> dict[str, Any]:
        s = self.settings
        subfolder, tokenizer = self._subfolders(s.encoder)
        model = model_identity(s.encoder, s.revision, subfolder)
        if "sha256" not in model:
            return {"model": model, "tokenizer": {"subfolder": tokenizer}}
        words = root(s.encoder) / (tokenizer or "")
        if not words.is_dir():
            raise StageError(f"embed.tokenizer: there is no folder {words}")
        return {"model": model, "tokenizer": {"sha256": folder_sha256(words)}}

    def _subfolders(self, folder: str) -> tuple[str | None, str | None]:
        """Where in `folder` the encoder and the tokenizer are."""
        whole = Path(folder, "model_index.json").is_file()
        s = self.settings
        subfolder = s.subfolder or ("text_encoder" if whole else None)
        return subfolder, s.tokenizer or ("tokenizer" if whole else subfolder)

    def folders(self) -> tuple[str, str]:
        """Where the encoder and the tokenizer lie, fetched first if they have to be. Raises
        StageError."""
        s = self.settings
        folder = root(s.encoder, s.revision, _OTHERS)
        subfolder, tokenizer = self._subfolders(str(folder))
        return str(folder / (subfolder or "")), str(folder / (tokenizer or ""))

    def bind(self, columns: pa.Schema) -> None:
        if self.column not in columns.names:
            raise StageError(
                f"embed.column is {self.column} and there is no such column."
                f"{did_you_mean(self.column, columns.names)}"
            )
        if not pa.types.is_string(columns.field(self.column).type):
            raise StageError(f"embed.column is {self.column}, which holds no text")

    def check(self) -> None:
        check(self.settings.encoder, self._subfolders(self.settings.encoder)[0])
        kind_of(self.folders()[0]).check(self.settings.max_length)

    def check_here(self) -> None:
        check_device(self.settings.device)

    def setup(self) -> Texts:
        s = self.settings
        encoder = TextEncoder(
            *self.folders(), s.dtype, s.device, s.max_length, s.padding, self._batch
        )
        stored = StoredEmbeddings(self.context.workdir, self.name, self.fingerprint)
        named = self.encoder()
        return Texts(encoder, lambda caption: key_of(caption, named), stored, REMEMBERED)

    def metadata(self, model: Texts) -> dict[str, Any]:
        s, kind = self.settings, model.encoder.kind
        spec = TextSpec(
            encoder=s.encoder,
            encoder_class=kind.class_name,
            encoder_sha256=folder_sha256(Path(self.folders()[0])),
            fingerprint=self.fingerprint,
            column=self.column,
            max_length=s.max_length,
            padding=s.padding,
            dtype=s.dtype,
            width=kind.width,
            empty_tokens=model.encoder.empty_tokens,
        )
        return {"spec": spec.to_json()}

    def process(self, rows: list[Row], model: Texts) -> list[Outcome]:
        # Where there is no caption a model is trained without one: on the empty caption's.
        captions = [row[self.column] or "" for row in rows]
        empty = model.empty()
        if isinstance(empty, Failed):  # a file without the empty caption's is of no use
            return [empty] * len(rows)
        texts = model.encode(captions)
        encoder = self.encoder()
        bearers: set[str] = set()
        outcomes: list[Outcome] = []
        for caption, text in zip(captions, texts, strict=True):
            if isinstance(text, Failed):
                outcomes.append(text)
                continue
            made = self._row(key_of(caption, encoder), text)
            if caption not in bearers:
                made |= {"embedding": text.values, "embedding_pooled": text.pooled}
            if not bearers:
                made["embedding_empty"] = empty
            bearers.add(caption)
            outcomes.append(made)
        return outcomes

    def _row(self, key: str, text: Text) -> Row:
        """What a row tells of its embedding. `packed` puts the rest in its place."""
        return {
            **dict.fromkeys((*_PAYLOAD, "embedding_empty", "embedding_row")),
            "embedding_shape": list(text.shape),
            "embedding_dtype": self.settings.dtype,
            "embedding_key": key,
            "embedding_tokens": text.tokens,
            "embedding_truncated": text.truncated,
        }

    def packed(self, rows: pa.Table, made: pa.Table) -> pa.Table:
        """Each embedding in the first row that has it, and the empty caption's in the first of all;
        every row says where its own stands."""
        keys = array(rows, "embedding_key")
        place = pc.index_in(keys, keys)  # the first row of the same key
        place = pc.if_else(keys.is_valid(), place, pa.scalar(None, pa.int32()))
        here = pa.array(np.arange(len(rows), dtype=np.int32))
        bears = pc.fill_null(pc.equal(place, here), False)
        first = pc.and_(bears, pc.equal(here, pc.min(place)))
        given = made.filter(array(made, "embedding").is_valid())
        source = pc.index_in(keys, array(given, "embedding_key"))
        told = made.filter(array(made, "embedding_empty").is_valid())
        columns = {
            name: array(given, name).take(pc.if_else(bears, source, pa.scalar(None, pa.int32())))
            for name in _PAYLOAD
        }
        zero = pc.if_else(first, pa.scalar(0), pa.scalar(None, pa.int64()))
        columns["embedding_empty"] = array(told, "embedding_empty").take(zero)
        columns["embedding_row"] = place
        for name, values in columns.items():
            rows = rows.set_column(rows.column_names.index(name), rows.schema.field(name), values)
        return rows
