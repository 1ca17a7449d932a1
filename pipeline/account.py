"""`vidpipe status`: the account of every stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from manifests.log import Counts
from manifests.scans import last_scan
from manifests.sources import read
from manifests.view import SOURCE_LAYER
from pipeline.dag import Pipeline
from pipeline.plan import status_and_amounts, worth_retry
from pipeline.report import describe, money


def account(pipeline: Pipeline) -> dict[str, Any]:
    """`{"workdir", "stages": [{"name", "fingerprint", "state", "in", "kept", "rejected": {reason:
    n}, "failed": {class: n}, "worth_retry", "pending", "amounts": {what: n}, "cost"}]}`, the source
    first. `worth_retry`: of the failed rows those that may come through as things are. `amounts`:
    what the stage counted in all its runs under these settings; `cost`: that in money, or null.

    `in == kept + Σrejected + Σfailed + pending` in each, at any moment.
    """
    totals, amounts = status_and_amounts(pipeline)
    worth = worth_retry(pipeline, totals)
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
                "worth_retry": worth.get(name, 0),
                "pending": counts.pending,
                "amounts": dict(sorted(amounts[name].items())),
                "cost": _cost(pipeline, name, amounts[name]),
            }
            for name, counts in totals.items()
        ],
    }


def _cost(pipeline: Pipeline, name: str, amounts: Mapping[str, int]) -> float | None:
    return pipeline.stages[name].cost(amounts) if amounts and name in pipeline.stages else None


def spent(name: str, amounts: Mapping[str, int], cost: float | None) -> str:
    """`recaption: 31,200 tokens, 812,000 prompt tokens (73% cached), cost 0.14`; empty where the
    stage counted none."""
    if not amounts.get("tokens"):
        return ""
    prompt = amounts.get("prompt_tokens", 0)
    cached = amounts.get("cached_tokens", 0)
    read = f", {prompt:,} prompt tokens" if prompt else ""
    share = f" ({cached / prompt:.0%} cached)" if prompt and cached else ""
    price = "" if cost is None else f", cost {money(cost)}"
    return f"{name}: {amounts['tokens']:,} tokens{read}{share}{price}"


def summary(pipeline: Pipeline, totals: Mapping[str, Counts], stages: Sequence[str]) -> list[str]:
    """The account of a run's stages in lines for a person, with why rows were lost."""
    lines = []
    for name in ["source", *stages]:
        counts = totals[name]
        pending = f", {counts.pending} pending" if counts.pending else ""
        lines.append(f"  {name:<10} {counts.total:>8} in: {describe(counts)}{pending}")
    rejected = [f"{n} {name}.{why}" for name in stages for why, n in totals[name].rejected.items()]
    if rejected:
        lines.append(f"rejected rows: {', '.join(rejected)}")
    failed = [f"{n} {name}.{why}" for name in stages for why, n in totals[name].failed.items()]
    if failed:
        last = next(name for name in reversed(stages) if totals[name].failed)
        lines.append(f"failed rows: {', '.join(failed)}")
        lines.append(f"see them: vidpipe show {last} --where \"outcome = 'failed'\"")
    worth = worth_retry(pipeline, {name: totals[name] for name in stages})
    return [*lines, *retry_hint(sum(worth.values()))]


def retry_hint(rows: int) -> list[str]:
    """A line that says how to try again, where that is worthwhile for so many failed rows."""
    which = "1 failed row is" if rows == 1 else f"{rows} failed rows are"
    line = f"{which} worth another try as things are: vidpipe run --retry-failed"
    return [line] if rows else []


def _state(name: str, totals: dict[str, Counts], pipeline: Pipeline) -> str:
    """done | pending | waiting: nothing in yet, because stages before it are not done."""
    above = [totals[a] for a in pipeline.dag.ancestors[name]]
    if totals[name].pending:
        return "pending"
    return "waiting" if any(a.pending for a in above) else "done"
