"""Embeddings of captions, each encoded once: remembered, copied from what is committed, or made."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from manifests.faults import StoreError
from manifests.stored import StoredEmbeddings
from stages.base import Failed, alive, count
from stages.text_encoders import Text, TextEncoder

# How often is looked for what others have committed, or this worker itself, at most; and of the
# time at most so much, as listing a large workdir far away takes long.
LOOK_SECONDS, LOOK_SHARE = 20.0, 0.1
# Bytes beyond those to remember that wait for their commit: of two units at once, what is settled,
# what is being written, and a batch.
UNCOMMITTED = 1 << 30


class Texts:
    """What the embed stage asks: a text encoder, the embeddings used last up to `remember` bytes,
    and those that are `stored`. `key` names an embedding by its caption.

    One that was made is kept until it stands in a commit: so a worker encodes no caption twice.
    """

    def __init__(
        self,
        encoder: TextEncoder,
        key: Callable[[str], str],
        stored: StoredEmbeddings,
        remember: int,
        uncommitted: int = UNCOMMITTED,
    ) -> None:
        self.encoder = encoder
        self._key, self._stored = key, stored
        self._most, self._more = remember, uncommitted
        self._kept: OrderedDict[str, Text] = OrderedDict()
        self._bytes = 0
        self._uncommitted: set[str] = set()  # of those kept, as of the last look
        self._empty: bytes | None = None
        self._next_look = 0.0

    def encode(self, captions: Sequence[str]) -> list[Text | Failed]:
        """One embedding per caption, in order. Failed for a caption that the device's memory does
        not hold, alone, and for one whose embedding is not finite."""
        found: dict[str, Text | Failed] = {}
        for caption in dict.fromkeys(captions):
            if caption in self._kept:
                self._kept.move_to_end(caption)
                found[caption] = self._kept[caption]
        lacking = [caption for caption in dict.fromkeys(captions) if caption not in found]
        for caption, text in [*self._copied(lacking)]:
            found[caption] = self._keep(caption, text)
        lacking = [caption for caption in lacking if caption not in found]
        for caption, made in zip(lacking, self.encoder.encode(lacking), strict=True):
            found[caption] = made
            if isinstance(made, Text):
                self._uncommitted.add(caption)
                self._keep(caption, made)
        count("encoded", len(lacking))
        self._forget()
        return [found[caption] for caption in captions]

    def empty(self) -> bytes | Failed:
        """The empty caption's embedding, which every file has."""
        if self._empty is None:
            if "" not in self._kept:
                self._look()
                self._empty = self._stored.empty()
            if self._empty is None:
                (text,) = self.encode([""])
                if isinstance(text, Failed):
                    return text
                self._empty = text.values
        return self._empty

    def _copied(self, captions: Sequence[str]) -> Iterator[tuple[str, Text]]:
        if not captions:
            return
        self._look()
        keys = {self._key(caption): caption for caption in captions}
        found = self._stored.find(keys)
        count("copied", len(found))
        for key, row in found.items():
            yield keys[key], _text(row)

    def _look(self) -> None:
        began = time.monotonic()
        if began < self._next_look:
            return
        try:
            self._stored.look(alive)
        except StoreError:
            pass  # nothing new is known then; what can't be written either is told by the commit
        self._uncommitted = {c for c in self._uncommitted if not self._stored.has(self._key(c))}
        now = time.monotonic()
        self._next_look = now + max(LOOK_SECONDS, (now - began) / LOOK_SHARE)

    def _keep(self, caption: str, text: Text) -> Text:
        self._kept[caption] = text
        self._bytes += len(text.values)
        return text

    def _forget(self) -> None:
        """Lets go of the oldest, as far as they can be copied from where they are committed, until
        the rest is what is to be remembered; of others where far more is kept."""
        if self._bytes <= self._most:
            return
        self._look()
        for caption in list(self._kept):
            if self._bytes <= self._most:
                return
            beyond = self._bytes > self._most + self._more
            if beyond or caption not in self._uncommitted:
                self._uncommitted.discard(caption)
                self._bytes -= len(self._kept.pop(caption).values)


def _text(row: dict[str, Any]) -> Text:
    tokens, width = row["embedding_shape"]
    return Text(
        values=row["embedding"],
        shape=(tokens, width),
        pooled=row["embedding_pooled"],
        tokens=row["embedding_tokens"],
        truncated=row["embedding_truncated"],
    )
