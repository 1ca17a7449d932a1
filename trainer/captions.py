"""The text of a visit: which of a clip's captions, whether it is dropped, and its embedding.

A dropped caption is the empty one, as in a prompt left empty (guidance: Ho & Salimans 2022).
Dropping is drawn for each visit by itself, so it is right at batch 1 and falls on other clips in
every epoch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from manifests.shards import Embedding, Index, ShardError, TextSpec
from trainer.config import SettingsError, TrainSettings
from trainer.keys import chance, keyed
from trainer.posterior import DTYPES, stored
from trainer.reader import Place, Row


class Captions:
    """The captions of an index' clips, in the order of `table`.

    Raises SettingsError where a weight names a kind of caption that no clip has.
    """

    def __init__(self, table: pa.Table, settings: TrainSettings) -> None:
        self._own = table.column("caption")
        named = "captions" in table.column_names  # not in an index of before there were several
        self._several = table.column("captions") if named else None
        self._weights, self._dropout = settings.captions, settings.caption_dropout
        check_kinds(self._weights, self._several)

    def at(self, clip: int, clip_id: str, seed: int, epoch: int) -> str:
        """The caption of a visit to the clip in row `clip`; "" where it is dropped or has none."""
        if dropped(self._dropout, clip_id, seed, epoch):
            return ""
        own = self._own[clip].as_py() or ""
        if self._several is None or not self._weights:
            return own
        others = {c["kind"]: c["text"] for c in self._several[clip].as_py() or ()}
        generator = keyed("which caption", seed, epoch, clip_id)
        return draw_caption(own, others, self._weights, generator)


def dropped(dropout: float, clip_id: str, seed: int, epoch: int) -> bool:
    return chance("caption", seed, epoch, clip_id) < dropout


def draw_caption(
    own: str, others: Mapping[str, str], weights: Mapping[str, float], generator: torch.Generator
) -> str:
    """One of a clip's captions by the weights of their kinds; `caption` is its `own`. What it has
    none of leaves its share to the rest, and without any the own one stands."""
    texts = {"caption": own, **others}
    kinds = [kind for kind, weight in weights.items() if weight > 0 and kind in texts]
    if not kinds:
        return own
    shares = torch.tensor([weights[kind] for kind in kinds], dtype=torch.float64)
    return texts[kinds[int(torch.multinomial(shares, 1, generator=generator))]]


def check_kinds(weights: Mapping[str, float], several: pa.ChunkedArray | None) -> None:
    """Raises SettingsError where weights name a kind of caption that no clip has."""
    kinds = {"caption"}
    if weights and several is not None:
        kinds |= set(pc.struct_field(pc.list_flatten(several), "kind").unique().to_pylist())
    if unknown := [kind for kind in weights if kind not in kinds]:
        raise SettingsError(
            f"train.captions has a weight for {unknown[0]}, and no clip has such a caption: there "
            f"are {', '.join(sorted(kinds))} (a preset of recaption makes several)"
        )


class Embeddings:
    """The stored embeddings of an index' captions.

    Raises ShardError where there are none, or clips without one.
    """

    def __init__(self, index: Index, table: pa.Table, dropout: float) -> None:
        spec = index.text
        keys = table.column("text_key") if spec is not None else None
        if spec is None or keys is None:
            raise ShardError(
                "train.text.kind is stored, but the index has no text embeddings: add the section "
                "`embed` to vidpipe.yaml and `vidpipe run`, or set train.text.kind to words"
            )
        if keys.null_count:
            clip = table.column("clip_id").filter(keys.is_null())[0].as_py()
            raise ShardError(
                f"{keys.null_count} clips of the index have no text embedding, {clip} among them: "
                "`vidpipe run` makes it anew"
            )
        self.spec: TextSpec = spec
        self.most_bytes = spec.max_length * spec.width * DTYPES[spec.dtype].itemsize  # of one
        names = pc.dictionary_encode(table.column("text_shard")).combine_chunks()
        self._names: list[str] = names.dictionary.to_pylist()
        self._shard_of = names.indices.to_numpy()
        self.shards = frozenset(self._names)
        self._rows = table.column("text_row").to_numpy()
        self._keys, self._dropout = keys, dropout
        empty = index.empty_caption()
        assert empty is not None  # there are shards of embeddings
        self._empty = self._values(empty, "the empty caption's embedding")

    def place(self, clip: int) -> Place:
        """Where the embedding of the clip in row `clip` is."""
        return Place(self._names[self._shard_of[clip]], int(self._rows[clip]))

    def at(self, clip: int, clip_id: str, seed: int, epoch: int, found: Row) -> Tensor:
        """The embedding of a visit, (tokens, width) as stored: what was `found` in its place, or
        the empty caption's where it is dropped. Raises ShardError where another's was found."""
        assert isinstance(found, Embedding)
        if (wanted := self._keys[clip].as_py()) != found.key:
            place = self.place(clip)
            raise ShardError(
                f"shard {place.shard} holds the embedding {found.key} in row {place.row}, where "
                f"the index says {wanted} for clip {clip_id}: the two do not belong together; "
                "`vidpipe run` makes the index anew"
            )
        if dropped(self._dropout, clip_id, seed, epoch):
            return self._empty
        return self._values(found, f"the embedding of clip {clip_id}")

    def _values(self, found: Embedding, name: str) -> Tensor:
        values = stored(found, f"the values of {name}")
        if values.dim() != 2 or values.shape[1] != self.spec.width:
            raise ShardError(
                f"{name} is of shape {list(found.shape)}, but the index says that "
                f"{self.spec.encoder} gives {self.spec.width} values a token: run `vidpipe run`"
            )
        return values


def padded(texts: Sequence[Tensor], pin: bool = False) -> tuple[Tensor, Tensor]:
    """Embeddings (L, D) of several lengths as (B, L, D), and which tokens are there: (B, L)."""
    lengths = torch.tensor([len(text) for text in texts])
    values = torch.nn.utils.rnn.pad_sequence(list(texts), batch_first=True)
    return values.pin_memory() if pin else values, torch.arange(values.shape[1]) < lengths[:, None]
