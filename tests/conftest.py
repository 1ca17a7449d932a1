"""Fixtures for all tests."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
from s3_faults import ENVIRONMENT, Proxy, s3_server

SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real videos and weights, kept beside the checkout; tests that need them skip without."""
    if not (SHARED / "SOURCES.csv").exists():
        pytest.skip("the real files (../shared/data) are not on this machine")
    return SHARED


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What vidpipe remembers between commands stays out of the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture(scope="session")
def s3_process() -> Iterator[Proxy]:
    pytest.importorskip("s3fs")
    pytest.importorskip("moto")
    with s3_server() as proxy:
        yield proxy


@pytest.fixture
def s3(s3_process: Proxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A real S3 server with a bucket BUCKET, found by the environment as a user's would be."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_process.url)
    # fsspec keeps filesystems, with the endpoint and the loop that they were made for.
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    s3_process.reset()
    yield s3_process
    s3_process.reset()


def _mount(*arguments: str) -> bool:
    return subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MiB; skips where this user may not mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if shutil.which("mount") is None or not _mount(
        "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(folder)
    ):
        pytest.skip("a file system can't be mounted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture
def remount(small_disk: Path) -> Callable[[str], None]:
    """Mounts `small_disk` again with other options: ro, rw, size=8m."""

    def mount(options: str) -> None:
        assert _mount("-o", f"remount,{options}", str(small_disk))

    return mount
