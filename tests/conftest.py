"""Fixtures for all tests."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import fsspec
import pytest
from parallel import (
    is_on_ray,
    pytest_collection_modifyitems,
    pytest_configure,
    pytest_xdist_make_scheduler,
)
from s3_faults import ENVIRONMENT, Proxy, s3_server
from shared_ray import on_runner, pytest_runtest_teardown, ray_address

__all__ = [
    "on_runner",
    "pytest_collection_modifyitems",
    "pytest_configure",
    "pytest_runtest_teardown",
    "pytest_xdist_make_scheduler",
    "ray_address",
]

SHARED = Path(__file__).parents[2] / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real videos and weights, kept beside the checkout; tests that need them skip without."""
    if not (SHARED / "SOURCES.csv").exists():
        pytest.skip("the real files (../shared/data) are not on this machine")
    return SHARED


@pytest.fixture(scope="session", autouse=True)
def own_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What vidpipe remembers between commands stays out of the user's home, and what is temporary
    out of the system's folder: yields what stands in for that one. Beside it there is place for
    more whose names are short, and it is removed at the end."""
    caches, states = (str(tmp_path_factory.mktemp(name)) for name in ("cache", "state"))
    # Ray and multiprocessing make sockets there, and their names have to be short.
    with tempfile.TemporaryDirectory(prefix="vp-", ignore_cleanup_errors=True) as place:
        temporary = Path(place, "t")
        temporary.mkdir()
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_CACHE_HOME", caches)
            patch.setenv("XDG_STATE_HOME", states)
            patch.setenv("RAY_TMPDIR", place)
            patch.setenv("RAY_USAGE_STATS_ENABLED", "0")  # which a private Ray turns off by itself
            patch.setenv("TMPDIR", str(temporary))
            patch.setattr(tempfile, "tempdir", None)
            yield temporary


@pytest.fixture(autouse=True)
def listed_if_on_ray(own_folders: Path, request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test on Ray that `make test` takes for another one."""

    def sessions() -> set[Path]:
        return set(own_folders.with_name("ray").glob("session_2*"))

    before = sessions()
    yield
    assert is_on_ray(request.node) or not sessions() - before, "add it to tests/parallel.py"


@pytest.fixture(autouse=True)
def nothing_is_left(own_folders: Path) -> Iterator[None]:
    """Of any test in the system's temporary folder, but for what PyTorch caches there and what
    wandb clears away when this process ends. What kills with SIGKILL gives the victim a TMPDIR of
    its own."""

    def there() -> set[str]:
        names = {path.name for path in own_folders.iterdir()}
        return {name for name in names if "torchinductor" not in name and "wandb" not in name}

    before = there()
    yield
    deadline = time.monotonic() + 10  # Ray's processes may need some seconds to be gone
    while (left := there() - before) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left, "files were left in the temporary folder"


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
