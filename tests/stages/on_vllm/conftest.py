"""vLLM itself: once in this process and once as a server. Its tests are skipped where it is not
installed; `make test-vllm` installs a build of it for CPUs."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import ENVIRONMENT, START_SECONDS, Server, stage

from stages.engines.vllm import VllmEngine

HERE = Path(__file__).parent
INSTALLED = importlib.util.find_spec("vllm") is not None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in (item for item in items if HERE in item.path.parents):
        item.add_marker(pytest.mark.timeout(2 * START_SECONDS))  # engines start slowly on CPUs
        if not INSTALLED:
            item.add_marker(pytest.mark.skip(reason="vLLM is not installed: make test-vllm"))


@pytest.fixture(scope="session")
def small_machine(own_folders: Path) -> Iterator[None]:
    place = own_folders.with_name("vllm")  # for what engines that are killed leave behind
    place.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TMPDIR", str(place))
        patch.setattr(tempfile, "tempdir", None)
        for name, value in ENVIRONMENT.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="session")
def engine(small_machine: None) -> Iterator[VllmEngine]:
    made = stage()
    made.check()
    running = made.setup()
    assert isinstance(running, VllmEngine)
    yield running
    core = running._llm.llm_engine.engine_core.resources.engine_manager.processes[0]
    assert core.is_alive()
    running.close()
    core.join(20)
    assert not core.is_alive(), "the engine's process was left"


@pytest.fixture(scope="session")
def server(small_machine: None, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    made = Server(tmp_path_factory.mktemp("server") / "log")
    try:
        made.start()
        yield made
    finally:
        made.kill()
