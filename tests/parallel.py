"""How `make test` spreads the tests over processes, by pytest-xdist; without it nothing changes."""

from __future__ import annotations

import os
from typing import Any

import pytest

# In these a Ray is started, of twenty processes, if not several after each other: one at a time,
# all by the same process, and first, as they take as long as a good part of the rest. `pytest`
# names files from the repository's root (`rootdir`).
ON_RAY = (
    "tests/faults/test_crashes.py",
    "tests/pipeline/test_caption_server.py",
    "tests/pipeline/test_checked_rows.py",
    "tests/pipeline/test_embeddings.py",
    "tests/pipeline/test_ray_data.py",
    "tests/pipeline/test_stop.py",
    "tests/pipeline/test_storage.py",
    "tests/pipeline/test_units_in_line.py",
    "tests/pipeline/test_worker.py",
    "tests/stages/on_vllm/test_vllm_run.py",
    "tests/test_real_videos.py",
    "tests/test_secrets.py",
)


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):  # several threads of several processes wait for each other
        os.environ.setdefault("OMP_NUM_THREADS", "1")


def _file(nodeid: str) -> str:
    return nodeid.partition("::")[0]


def is_on_ray(item: pytest.Item) -> bool:
    return _file(item.nodeid) in ON_RAY


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Files as a whole, since their tests share fixtures; those on Ray are as one file."""
    from xdist.scheduler import LoadFileScheduling

    class Files(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "on Ray" if _file(nodeid) in ON_RAY else _file(nodeid)

    config.option.loadscopereorder = False  # not by number: in the order of collection
    return Files(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: not is_on_ray(item))
