"""The Ray that a run is on: a private one on this machine, or a cluster at an address."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ray
from ray.autoscaler.sdk import request_resources

from pipeline.config import RunSettings
from pipeline.errors import RunError
from pipeline.report import Reporter
from pipeline.resources import Offer, cores, usable_gpus
from pipeline.workers import stop

# Only names of units pass through the object store.
OBJECT_STORE_BYTES = 128 << 20
POLL_SECONDS = 0.5
# Of a temporary folder's name: a socket's has 107 characters at most, and 53 are added to it.
LONGEST = 50


@contextlib.contextmanager
def cluster(run: RunSettings, base: Path, report: Reporter) -> Iterator[Offer]:
    """A private Ray on this machine, or the one at `run.address`; gone again afterwards.

    Yields what it offers. Raises ConfigError where more GPUs are asked for than there are.
    """
    # The C++ side of the driver writes its messages straight to stderr, amid the progress.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # Memory that runs out is left to the kernel: it ends the worker's child that takes most, which
    # is then known to have died of it. Ray would end the worker, whose child takes it unseen.
    os.environ.setdefault("RAY_memory_monitor_refresh_ms", "0")
    # A worker that was given no GPU must see none, or every `device: auto` takes the first.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "1")
    # Stages of the user's own are modules beside vidpipe.yaml. A private Ray hands its workers this
    # process' environment; a runtime_env would do it too, and cost each worker a second start.
    path = os.pathsep.join(filter(None, (str(base), os.environ.get("PYTHONPATH"))))
    options: dict[str, Any] = {
        "address": "local",
        "num_cpus": cores(),
        "object_store_memory": OBJECT_STORE_BYTES,
        "include_dashboard": True,
    }
    if run.address is not None:
        runtime_env = {"env_vars": {"PYTHONPATH": path}}
        options = {"address": run.address, "runtime_env": runtime_env}
    with contextlib.ExitStack() as stack:
        own = {"PYTHONPATH": path}
        if run.address is None:
            # Its dashboard leaves a folder behind: in one that is removed. Ray's logs stay where
            # they are looked for.
            logs = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"  # noqa: S108
            above = tempfile.gettempdir()
            if len(above) > LONGEST:
                above = logs
                Path(above).mkdir(parents=True, exist_ok=True)
            place = tempfile.TemporaryDirectory(
                prefix="vidpipe-ray-", dir=above, ignore_cleanup_errors=True
            )
            own |= {"RAY_TMPDIR": logs, "TMPDIR": place.name}
            stack.enter_context(stop.cleaning(place.cleanup))
        stack.callback(ray.shutdown)
        with stop.raised():
            try:
                with _environment(own), _muted_stderr():
                    context = ray.init(**options, log_to_driver=False, logging_level=logging.ERROR)
            except Exception as error:  # bare ones where parts of Ray come too late
                where = run.address or "this machine"
                remedy = "" if run.address else "; try again, or without it: --runner local"
                why = str(error).rstrip(".")
                raise RunError(f"Ray can't be started on {where}: {why}{remedy}") from error
            stop.renew()  # Ray takes SIGTERM for itself
            if context.dashboard_url:
                report.note(f"Ray dashboard: http://{context.dashboard_url}")
            if run.address is not None:
                _await_nodes(run, report)
        there = ray.cluster_resources()
        yield Offer(there.get("CPU", 0.0), usable_gpus(run, there.get("GPU", 0.0)))


def _await_nodes(run: RunSettings, report: Reporter) -> None:
    """Asks the autoscaler for the GPUs of `--gpus`, or for any CPU where there is none (a head
    that does no work), and waits: such a cluster has no workers until somebody wants them."""
    kind, wanted = ("GPU", run.gpus) if run.gpus else ("CPU", 1)
    deadline = time.monotonic() + run.wait
    asked = False
    while ray.cluster_resources().get(kind, 0.0) < wanted and time.monotonic() < deadline:
        if not asked:
            report.note(f"asking the cluster for {wanted} {kind}, waiting up to {run.wait} s")
            request_resources(bundles=[{kind: 1}] * wanted)
            asked = True
        time.sleep(POLL_SECONDS)


@contextlib.contextmanager
def _muted_stderr() -> Iterator[None]:
    """Drops what C++ code writes to file descriptor 2: Ray announces its own log level there."""
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


@contextlib.contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
