"""cluster.yaml is a file that `ray up` accepts, by Ray's own schema."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

FILE = Path(__file__).parents[1] / "cluster.yaml"


def filled() -> dict[str, Any]:
    """The configuration as `ray up` validates it: with the provider's defaults filled in."""
    from ray.autoscaler._private.util import fillout_defaults

    config = yaml.safe_load(FILE.read_text())
    return dict(fillout_defaults(config))


def test_ray_accepts_it() -> None:
    from ray.autoscaler._private.util import validate_config

    validate_config(filled())


def test_ray_would_refuse_a_typo() -> None:
    from ray.autoscaler._private.util import validate_config

    config = filled()
    config["max_wrokers"] = 3
    with pytest.raises(Exception, match="max_wrokers"):
        validate_config(config)


def test_the_head_does_no_work_and_gpus_come_and_go() -> None:
    types = yaml.safe_load(FILE.read_text())["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    gpu = {name: t for name, t in types.items() if t["resources"].get("GPU")}
    assert all(t["min_workers"] == 0 < t["max_workers"] for t in gpu.values())
    spot = [n for n, t in gpu.items() if "InstanceMarketOptions" in t["node_config"]]
    assert spot, "the spot market is shown"
