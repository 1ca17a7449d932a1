"""FastVideo: Parquet files of rows with tensors as bytes, float32 whatever the row says.

Read by `LatentsParquetMapStyleDataset` of fastvideo/dataset, with `pyarrow_schema_t2v`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from manifests.schema import digest
from pipeline.export.base import UMT5, WAN, Clip, Entry, Item, Target, Wants

FOLDER = "combined_parquet_dataset"


def _tensor(name: str) -> list[pa.Field]:
    return [
        pa.field(f"{name}_bytes", pa.binary()),
        pa.field(f"{name}_shape", pa.list_(pa.int64())),
        pa.field(f"{name}_dtype", pa.string()),
    ]


SCHEMA = pa.schema(
    [
        pa.field("id", pa.string()),
        *_tensor("vae_latent"),
        *_tensor("text_embedding"),
        pa.field("file_name", pa.string()),
        pa.field("caption", pa.string()),
        pa.field("media_type", pa.string()),
        pa.field("width", pa.int64()),
        pa.field("height", pa.int64()),
        pa.field("num_frames", pa.int64()),
        pa.field("duration_sec", pa.float64()),
        pa.field("fps", pa.float64()),
    ]
)


class FastVideo(Target):
    name = "fastvideo"
    about = "hao-ai-lab/FastVideo: Parquet with the mean, not normalised, and unpadded embeddings"
    vaes = {WAN: Wants(UMT5, ("none",), moments=False)}
    dtypes = False

    def items(self, entries: Sequence[Entry]) -> Iterator[Item]:
        """One file for the clips of a latent shard: its reader is slow with many files."""
        if entries:
            name = f"{FOLDER}/{digest(entries[0].shard)}.parquet"
            state = self.state(entries, ("latents", "text"))
            yield Item(name, ("latents", "text"), tuple(entries), state)

    def write(self, item: Item, clips: Iterator[Clip], path: Path) -> None:
        # Of a row its reader reads the whole row group.
        with pq.ParquetWriter(path, SCHEMA, compression="zstd") as writer:
            for clip in clips:
                writer.write_table(pa.Table.from_pylist([_row(clip)], SCHEMA))


def _row(clip: Clip) -> dict[str, Any]:
    frames, height, width = clip.pixels
    return {
        "id": clip.entry.clip_id,
        **_bytes("vae_latent", clip.mean),
        **_bytes("text_embedding", clip.embedding.float()),
        "file_name": clip.entry.clip_id,
        "caption": clip.entry.caption,
        "media_type": "video",
        "width": width,
        "height": height,
        "num_frames": clip.entry.shape[1],  # of latents: its own writer has it so
        "duration_sec": frames / clip.fps,
        "fps": clip.fps,
    }


def _bytes(name: str, values: Any) -> dict[str, Any]:
    return {
        f"{name}_bytes": values.contiguous().numpy().tobytes(),
        f"{name}_shape": list(values.shape),
        f"{name}_dtype": "float32",
    }
