"""`vidpipe status`: the account of every stage."""

from __future__ import annotations

from typing import Any

from manifests.intake import last_scan
from manifests.log import Counts
from manifests.sources import read
from manifests.view import SOURCE_LAYER
from pipeline.dag import Pipeline
from pipeline.plan import status


def account(pipeline: Pipeline) -> dict[str, Any]:
    """`{"workdir", "stages": [{"name", "fingerprint", "state", "in", "kept", "rejected": {reason:
    n}, "failed": {class: n}, "pending"}]}`, the source first.

    `in == kept + Σrejected + Σfailed + pending` in each, at any moment.
    """
    totals = status(pipeline)
    if last_scan(pipeline.store) is None:
        # Nothing has run: the rows are counted, so that all of them show as pending.
        rows = sum(1 for _ in read(pipeline.config.source))
        totals[SOURCE_LAYER] = Counts(total=rows, pending=rows)
    return {
        "workdir": pipeline.config.workdir,
        "stages": [
            {
                "name": name,
                "fingerprint": pipeline.dag.layers[name].fingerprint,
                "state": _state(name, totals, pipeline),
                "in": counts.total,
                "kept": counts.kept,
                "rejected": dict(sorted(counts.rejected.items())),
                "failed": dict(sorted(counts.failed.items())),
                "pending": counts.pending,
            }
            for name, counts in totals.items()
        ],
    }


def _state(name: str, totals: dict[str, Counts], pipeline: Pipeline) -> str:
    """done | pending | waiting: nothing in yet, because stages before it are not done."""
    above = [totals[a] for a in pipeline.dag.ancestors[name]]
    if totals[name].pending:
        return "pending"
    return "waiting" if any(a.pending for a in above) else "done"
