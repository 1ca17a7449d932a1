"""A Ray that tests share which need any: to start one takes some ten seconds of CPU, in twenty
processes. Tests of how Ray is started, stopped and killed have a private one each."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
from s3_faults import ENVIRONMENT as S3
from s3_faults import Proxy

_KEPT = pytest.StashKey["Shared"]()
# What a private Ray of vidpipe's gets: pipeline/ray_cluster.py.
ENVIRONMENT = {
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "RAY_memory_monitor_refresh_ms": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
}


class Shared:
    """Begun with the environment of now and `more`. `place`: for what it leaves there."""

    def __init__(self, place: Path, more: Mapping[str, str]) -> None:
        from ray.cluster_utils import Cluster

        from pipeline.resources import cores

        place.mkdir(exist_ok=True)
        before = set(psutil.Process().children())
        with pytest.MonkeyPatch.context() as patch:
            for name, value in {**ENVIRONMENT, **more, "TMPDIR": str(place)}.items():
                patch.setenv(name, value)
            node = {"num_cpus": cores(), "include_dashboard": False, "include_log_monitor": False}
            self._cluster = Cluster(initialize_head=True, head_node_args=node)
        self._own = set(psutil.Process().children()) - before
        self.address = str(self._cluster.address)

    def end(self) -> None:
        """Returns when all of its processes are gone, which write into the folder of its logs."""
        own = list(self._own)
        for process in self._own:
            with contextlib.suppress(psutil.NoSuchProcess):
                own += process.children(recursive=True)
        self._cluster.shutdown()
        for process in psutil.wait_procs(own, 10)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(own, 10)


@pytest.fixture
def ray_address(request: pytest.FixtureRequest, own_folders: Path, s3_process: Proxy) -> str:
    """The address of a Ray on this machine, for `run.address` and `--address`. Its workers find the
    S3 server of `s3`, too."""
    stash = request.session.stash
    if _KEPT not in stash:
        environment = {**S3, "AWS_ENDPOINT_URL": s3_process.url}
        stash[_KEPT] = Shared(own_folders.with_name("shared"), environment)
    return stash[_KEPT].address


@pytest.fixture
def on_runner(request: pytest.FixtureRequest) -> Callable[[str], dict[str, Any]]:
    """Settings of `run` for a runner of this name; `ray` is the one that tests share."""

    def settings(runner: str) -> dict[str, Any]:
        shared = {"address": request.getfixturevalue("ray_address")} if runner == "ray" else {}
        return {"runner": runner, **shared}

    return settings


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Ends it with the last test of a file: what runs that were killed leave in it does not reach
    other files' tests. First of all, as after the very last test the folder of its logs goes, too.
    """
    if _KEPT in item.session.stash and (nextitem is None or nextitem.path != item.path):
        item.session.stash[_KEPT].end()
        del item.session.stash[_KEPT]
