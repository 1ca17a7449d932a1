"""How a decoder is chosen, and what comes of one that is not there or does not hold."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from numbered import make, number

from stages.base import Context, StageError
from stages.encode import Encode, EncodeSettings
from stages.media import backends
from stages.media.backends.base import Picture
from stages.media.backends.others import Unable, or_pyav
from stages.media.frames import read_clip
from stages.media.sampling import Sampling
from stages.media.video import Budget, VideoError

SMALL = Sampling(fps=25, frames=10, size=64)


def encode(**settings: Any) -> Encode:
    return Encode(EncodeSettings(**settings), Context(".", sampling=Sampling(frames=4, size=64)))


def test_a_decoder_that_is_not_installed_is_told_before_the_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    stage = encode(backend="torchcodec")
    for begins in (stage.check, stage.setup):
        with pytest.raises(StageError, match=r"pip install 'vidpipe\[torchcodec\]'"):
            begins()
    encode(backend="pyav").check()


def test_other_decoders_may_give_other_latents() -> None:
    chosen = {encode(backend=name).fingerprint for name in ("pyav", "decord", "torchcodec")}
    assert len(chosen) == 3
    assert encode().fingerprint in chosen


def test_pyav_goes_on_where_another_fails(tmp_path: Path) -> None:
    path = str(make(tmp_path / "a.mp4", 40, 25))

    def three(
        path: str, times: Sequence[float], budget: Budget, threads: int = 1
    ) -> Iterator[Picture]:
        for _ in range(3):
            yield Picture(np.zeros((64, 64, 3), np.uint8))
        raise Unable("no more")

    clip = read_clip(path, SMALL, backend=or_pyav(three))
    assert [number(frame) for frame in clip.frames] == [0, 0, 0, 3, 4, 5, 6, 7, 8, 9]


@pytest.mark.parametrize("name", ["pyav", "decord", "torchcodec"])
class TestEach:
    def backend(self, name: Any) -> Any:
        if lacking := backends.missing(name):
            pytest.skip(lacking)
        return backends.named(name)

    def test_a_url_reads_as_a_file_does(self, tmp_path: Path, name: str) -> None:
        path = make(tmp_path / "a.mp4", 40, 25, bf="2")
        with fsspec.open(f"memory://backends/{name}.mp4", "wb") as file:
            file.write(path.read_bytes())
        there = read_clip(f"memory://backends/{name}.mp4", SMALL, 0.4, backend=self.backend(name))
        here = read_clip(str(path), SMALL, 0.4, backend=self.backend(name))
        assert [number(frame) for frame in here.frames] == list(range(10, 20))
        assert np.array_equal(there.frames, here.frames)

    def test_threads_read_each_with_a_reader_of_their_own(self, tmp_path: Path, name: str) -> None:
        paths = [str(make(tmp_path / f"{i}.mp4", 40, 25, bf="2")) for i in range(8)]
        decode = self.backend(name)
        with ThreadPoolExecutor(4) as pool:
            clips = list(pool.map(lambda path: read_clip(path, SMALL, 0.4, backend=decode), paths))
        for clip in clips:
            assert [number(frame) for frame in clip.frames] == list(range(10, 20))

    def test_what_is_no_video_says_so(self, tmp_path: Path, name: str) -> None:
        playlist = tmp_path / "a.mp4"
        playlist.write_text("#EXTM3U\n#EXTINF:1,\n/etc/passwd\n")
        with pytest.raises(VideoError) as error:
            read_clip(str(playlist), SMALL, backend=self.backend(name))
        assert error.value.error == "not_a_video"

    def test_a_clip_has_its_time(self, tmp_path: Path, name: str) -> None:
        path = str(make(tmp_path / "a.mp4", 40, 25))
        decode, budget = self.backend(name), Budget()
        pictures = decode(path, [0.0, 0.4, 0.8, 1.2], budget)
        next(pictures)
        budget.seconds = 0.0
        with pytest.raises(VideoError) as error:
            list(pictures)
        assert error.value.error == "decode_timeout"

    def test_pixels_that_are_not_square(self, tmp_path: Path, name: str) -> None:
        """Twice as wide as high, and turned: twice as high as wide."""
        decode = self.backend(name)
        for rotation, shape in (((0, False, False), 2.0), ((90, False, False), 0.5)):
            path = make(
                tmp_path / f"{rotation[0]}.mp4",
                10,
                25,
                rotation=rotation,
                **{"x264-params": "sar=2/1"},
            )
            (picture,) = decode(str(path), [0.2], Budget())
            if isinstance(picture.frame, np.ndarray):
                assert picture.pixel == shape
            else:
                assert picture.pixel == 2.0
            fitted = read_clip(str(path), SMALL.model_copy(update={"fit": "pad"}), backend=decode)
            inner = fitted.frames[7].any(axis=2)  # black bars beside what is shown
            lit = inner.any(axis=0 if shape < 1 else 1)
            assert 0 < lit.sum() <= 32
