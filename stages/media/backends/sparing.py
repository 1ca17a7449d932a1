"""Chosen frames with as little decoding as they allow, right to the bit.

A frame is made from the packets between its key frame (the last one before it, in the file and as
shown) and its own. Packets are read in the file's order, kept, and given to the decoder once a
wanted frame needs them. So groups of pictures without a wanted frame are not decoded, nor what
follows the last one; and pictures that no other is made from are skipped unless they are wanted.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

from stages.media.backends.base import Picture
from stages.media.video import Budget, Video, opened, packets, refuse_encrypted, seek

# Seconds before the first frame where reading begins: first try, second try, the beginning.
SEEK_BACK = (0.5, 10.0, None)
# Decoders of FFmpeg that can be told for each packet to skip a picture that no other needs
# (AVDISCARD_NONREF), with all others the same to the bit (tests/stages/media/test_exactness.py).
SKIPPING = ("h264", "hevc", "mpeg4", "mpeg2video", "mpeg1video", "vp8")
# Bytes of packets that are kept while none is known to be needed; then they are decoded anyway.
KEPT = 64 << 20


class Unsure(Exception):
    """The packets or the decoder do not keep to the rules: decode all there is, in order.
    `keyless`: from the beginning, as what is marked as a key frame is none (intra refresh)."""

    def __init__(self, keyless: bool = False) -> None:
        super().__init__()
        self.keyless = keyless


class _Late(Exception):
    """What the frame is made from lies before where reading began."""


def decode(path: str, times: Sequence[float], budget: Budget, threads: int) -> Iterator[Picture]:
    """The frames at `times`, a `base.Backend`. Raises Unsure before a frame that is not certain:
    those before it, in order, are right."""
    done = 0
    for back in SEEK_BACK:
        with opened(path, threads, budget) as video:
            sought = back is not None and seek(video, times[done] - back)
            try:
                for picture in _Decoding(video, times[done:], not sought).pictures():
                    yield picture
                    done += 1
            except _Late:
                continue
            return
    raise Unsure


def one_layer(codec: Any) -> bool:
    """False where a picture that none of its temporal layer needs may be needed by a higher one's:
    HEVC, but for streams that say that they have a single layer (ISO/IEC 14496-15, 8.3.3.1)."""
    if codec.name != "hevc":
        return True
    record = codec.extradata or b""
    return len(record) > 21 and record[0] == 1 and record[21] >> 3 & 7 == 1


def intra(packet: Any, codec: Any) -> bool:
    """Whether a packet that is marked as a key frame may be one. H.264 with intra refresh marks
    pictures that are made from others: by their first slice's type (ITU-T H.264, 7.3.3)."""
    if codec.name != "h264":
        return True
    record, data = codec.extradata or b"", bytes(packet)
    size = (record[4] & 3) + 1 if len(record) > 4 and record[0] == 1 else 0
    for at in units(data, size):
        if data[at] & 31 in (1, 5):
            return slice_type(data[at + 1 : at + 9]) % 5 == 2
    return True


def units(data: bytes, size: int) -> Iterator[int]:
    """Where NAL units begin: each after its length of `size` bytes, or (0) after a start code."""
    at = 0
    while at < len(data):
        if size:
            start = at + size
            at = start + int.from_bytes(data[at:start])
        else:
            start = at = data.find(b"\0\0\1", at) + 3
            if at < 3:
                return
        if start < len(data):
            yield start


def slice_type(header: bytes) -> int:
    """The second of the Exp-Golomb numbers that a slice begins with."""
    bits = f"{int.from_bytes(header):0{8 * len(header)}b}"
    value = 0
    for _ in range(2):
        zeros = len(bits) - len(bits.lstrip("0"))
        value = int(bits[zeros : 2 * zeros + 1] or "0", 2) - 1
        bits = bits[2 * zeros + 1 :]
    return value


class _Decoding:
    """One pass over the packets, for frames at `times`."""

    def __init__(self, video: Video, times: Sequence[float], beginning: bool) -> None:
        if not video.stamped:
            raise Unsure
        self._video, self._beginning = video, beginning
        self._codec = video.stream.codec_context
        self._skips = self._codec.name in SKIPPING and one_layer(self._codec)
        self._wanted = deque(round((time + video.origin) / video.tick) for time in times)
        self._chosen = frozenset(self._wanted)
        self._unmet = deque(self._wanted)  # whose packets have not come; those that have
        self._met: set[int] = set()
        self._arrived: dict[int, Any] = {}
        # Packets by their number in the file, from `_first` on; those before `_fed` were decoded.
        self._kept: deque[Any] = deque()
        self._first, self._fed, self._bytes = 0, -1, 0
        # Of the last two key frames: number, when it is shown, whether an edit list hides it. Then
        # of the one that decoding began with: when it is shown, and whether it stood for itself.
        self._keys: deque[tuple[int, int, bool]] = deque(maxlen=2)
        self._start: int | None = None
        self._proven = False

    def pictures(self) -> Iterator[Picture]:
        pixel = float(self._video.stream.sample_aspect_ratio or 1) or 1.0
        for packet in packets(self._video, self._video.stream):
            if packet.size:
                self._take(packet)
            while self._wanted and self._wanted[0] in self._arrived:
                yield Picture(self._arrived.pop(self._wanted.popleft()), pixel)
            if not self._unmet:
                break
        self._drain()
        while self._wanted and self._wanted[0] in self._arrived:
            yield Picture(self._arrived.pop(self._wanted.popleft()), pixel)
        if self._wanted:
            raise Unsure

    def _take(self, packet: Any) -> None:
        refuse_encrypted(packet)
        if packet.pts is None:
            raise Unsure
        number = self._first + len(self._kept)
        if packet.is_keyframe and intra(packet, self._codec):
            if self._keys:
                self._forget(self._keys[-1][0])  # needed by no frame to come
            self._keys.append((number, packet.pts, packet.is_discard))
        self._kept.append(packet)
        self._bytes += packet.size
        met = packet.pts in self._chosen and not packet.is_discard
        if met:
            self._met.add(packet.pts)
        if met or self._bytes > KEPT:
            # Frames that come later in the file, but are shown before, may need more.
            self._feed(min(packet.pts, *islice(self._unmet, 1)))
        while self._unmet and self._unmet[0] in self._met:
            self._met.remove(self._unmet.popleft())

    def _feed(self, pts: int) -> None:
        """Decodes the packets kept that frames shown at `pts` and after it need."""
        key = next((key for key in reversed(self._keys) if key[1] <= pts), None)
        if key is None and self._beginning:
            raise Unsure
        if key is None or (key[0] < self._first and key[0] > self._fed):
            raise _Late
        if key[0] > self._fed:  # what lies between is left out, so the decoder begins anew
            if self._fed >= 0:
                self._drain()
                self._codec.flush_buffers()
            self._forget(key[0])
            self._start, self._proven = key[1], key[2]
        for packet in self._kept:
            self._decode(packet, leading=packet.pts < key[1])
        self._fed = self._first = self._first + len(self._kept)
        self._kept.clear()
        self._bytes = 0

    def _forget(self, number: int) -> None:
        """The packets before `number`, undecoded."""
        while self._first < number:
            self._bytes -= self._kept.popleft().size
            self._first += 1

    def _decode(self, packet: Any, leading: bool) -> None:
        import av

        if self._skips:
            skip = packet.pts not in self._chosen
            self._codec.skip_frame = "NONREF" if skip else "DEFAULT"
        try:
            frames = packet.decode()
        except av.error.FFmpegError as error:
            # Shown before the key frame that decoding began with: made from what was left out.
            if leading and packet.pts not in self._chosen:
                return
            raise Unsure from error
        if packet.is_corrupt:
            raise Unsure
        self._arrive(frames)

    def _arrive(self, frames: Sequence[Any]) -> None:
        from av.video.frame import PictureType

        for frame in frames:
            if frame.pts == self._start:
                self._proven = frame.pict_type == PictureType.I
            if frame.pts in self._chosen:
                if frame.is_corrupt or not self._proven:
                    raise Unsure(keyless=not self._proven)
                self._arrived.setdefault(frame.pts, frame)

    def _drain(self) -> None:
        """The frames that the decoder held back, as later ones might have come before them."""
        import av

        try:
            self._arrive(self._codec.decode(None))
        except av.error.FFmpegError as error:
            raise Unsure from error
