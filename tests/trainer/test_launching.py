"""Real trainers, started as `vidpipe train` starts them: two processes, two nodes, a batch job."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from pipeline import launching
from pipeline.commands.train import train as command
from pipeline.config import ConfigError
from pipeline.launching import Fleet, by_hand, call, configuration, fleet, slurm_script

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def from_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def weights(output: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = load_file(output / "model" / "model.safetensors")
    return found


def words(settings: Any) -> tuple[str, ...]:
    file = settings.output.with_suffix(".json")
    file.write_text(settings.model_dump_json())
    return ("trainer.train", "--config", str(file))


def run(settings: Any, processes: int = 1) -> int:
    own = Fleet(processes)
    return call(own.command(*words(settings)), own.environment)


def killed(settings: Any, line: str, processes: int) -> int:
    """Runs it until it says `line`, then kills the processes that train."""
    own = Fleet(processes)
    with subprocess.Popen(
        own.command(*words(settings)),
        env={**os.environ, **own.environment},
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stderr is not None
        for said in process.stderr:
            if said.startswith(line):
                break
        training = launching.trainers(process.pid)
        assert len(training) == processes
        for pid in training:
            os.kill(pid, signal.SIGKILL)
        process.stderr.read()
        return process.wait(120)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


# ---------------------------------------------------------------------------- two processes


def test_two_processes_that_are_killed_go_on_bit_for_bit(
    make_index: Any, settings_of: Any, tmp_path: Path
) -> None:
    made = make_index()
    same = {"save_every": 2, "log_every": 1, "caption_dropout": 0.5}
    parts = settings_of(made, output=str(tmp_path / "parts"), steps=100_000, **same)
    assert killed(parts, "step 5/", 2) != 0
    steps = max(int(f.name.split("-")[1]) for f in parts.output.glob("checkpoint-*[0-9]")) + 5
    parts = settings_of(made, output=str(tmp_path / "parts"), steps=steps, **same)
    whole = settings_of(made, output=str(tmp_path / "whole"), steps=steps, **same)
    assert run(parts, 2) == 0 and run(whole, 2) == 0
    for name, value in weights(whole.output).items():
        assert torch.equal(value, weights(parts.output)[name]), name


def test_where_one_process_dies_the_run_ends(make_index: Any, settings_of: Any) -> None:
    """The other is not left behind, nor is the port looked for that several nodes would take."""
    settings = settings_of(make_index(), steps=100_000, save_every=100_000, log_every=1)
    own = Fleet(2)
    with (
        _held(launching.DEFAULT_PORT),
        subprocess.Popen(
            own.command(*words(settings)),
            env={**os.environ, **own.environment},
            stderr=subprocess.PIPE,
            text=True,
        ) as process,
    ):
        assert process.stderr is not None
        for said in process.stderr:
            if said.startswith("step 2/"):
                break
        training = launching.trainers(process.pid)
        os.kill(training[1], signal.SIGKILL)
        said = process.stderr.read()
        assert process.wait(120) == 128 + signal.SIGKILL
    assert len(training) == 2 and not any(Path(f"/proc/{pid}").exists() for pid in training)
    assert f"process 1 (pid {training[1]}) was ended by signal 9 (SIGKILL)" in said
    assert "Traceback" not in said


@contextlib.contextmanager
def _held(port: int) -> Iterator[None]:
    """Somebody, if not this, listens on the port."""
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            stack.enter_context(socket.create_server(("", port)))
        yield


@pytest.mark.parametrize("processes", [1, 2])
def test_a_stop_is_handed_on_and_is_no_failure(
    processes: int, make_index: Any, settings_of: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    settings = settings_of(make_index(), steps=100_000, save_every=100_000, log_every=1)
    logged = settings.output / "logs"

    def stop() -> None:
        deadline = time.monotonic() + 400
        while not list(logged.rglob("events.*")) and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(1.0)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()
    assert run(settings, processes) == 0
    (saved,) = settings.output.glob("checkpoint-*")
    assert f"stopped at step {saved.name.split('-')[1]} of 100000" in capfd.readouterr().err


def test_under_nohup_a_hangup_stops_nothing() -> None:
    child = "import os, signal; os.kill(os.getppid(), signal.SIGHUP)"
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        waits = f"{child}; signal.signal(15, lambda *_: os._exit(3)); import time; time.sleep(2)"
        assert call([sys.executable, "-c", waits]) == 0
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


# ---------------------------------------------------------------------------- several nodes


def test_two_nodes_by_hand(make_index: Any, settings_of: Any, tmp_path: Path) -> None:
    settings = settings_of(make_index(), steps=4, save_every=4)
    own = Fleet(1, nodes=2, head="127.0.0.1", port=free_port())
    script = by_hand(own, *words(settings))
    lines = [line for line in script.splitlines() if not line.startswith("#")]
    nodes = [subprocess.Popen(["bash", "-c", line], cwd=tmp_path) for line in lines]
    assert len(nodes) == 2
    assert [node.wait(200) for node in nodes] == [0, 0]
    assert weights(settings.output)


def test_a_port_that_is_taken_is_told(tmp_path: Path) -> None:
    with socket.create_server(("", 0)) as held:
        port = held.getsockname()[1]
        first, second = (
            line
            for line in by_hand(
                Fleet(1, nodes=2, head="a", port=port), "trainer.train"
            ).splitlines()
            if not line.startswith("#")
        )
        done = subprocess.run(["bash", "-c", first], capture_output=True, text=True)
    assert done.returncode == 2
    assert f"port {port} of this machine cannot be used (Address already in use)" in done.stderr
    assert "--head HOST:PORT" in done.stderr and "torch" not in done.stderr
    assert "pipeline.port" not in second


SRUN = """#!/bin/bash
# As Slurm's: a task a node; a SIGTERM to srun itself kills them.
trap 'kill -KILL $tasks' TERM
[[ $1 == --kill-on-bad-exit=1 ]] && shift
for rank in 0 1; do SLURM_PROCID=$rank "$@" & tasks="$tasks $!"; done
echo $tasks > "$NOTED.tasks"
echo "$SRUN_CPUS_PER_TASK" > "$NOTED.cpus"
for task in $tasks; do while kill -0 $task 2>/dev/null; do wait $task; done; done
"""
SCONTROL = """#!/bin/bash
case $1 in
show) echo 127.0.0.1 ;;
requeue) echo "requeue $2" >> "$NOTED" ;;
esac
"""
SCANCEL = """#!/bin/bash
# As Slurm's: all processes of the tasks hear it.
[ "$*" = "--signal=TERM 77" ] || exit 1
for task in $(cat "$NOTED.tasks"); do kill -TERM $task $(cat /proc/$task/task/*/children); done
"""


def slurm(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stands in for the commands that a batch script calls; returns what they note."""
    tools, noted = folder / "bin", folder / "noted"
    tools.mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL), ("scancel", SCANCEL)):
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_JOB_NODELIST", "node[0-1]")
    monkeypatch.setenv("NOTED", str(noted))
    return noted


def test_a_batch_script_runs_and_queues_itself_again_when_the_time_is_up(
    make_index: Any, settings_of: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = slurm(tmp_path, monkeypatch)
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "6")
    made = make_index()
    settings = settings_of(made, steps=100_000, save_every=100_000, log_every=1)
    own = Fleet(1, nodes=2, port=free_port())
    script = tmp_path / "slurm.sh"
    script.write_text(slurm_script(own, tmp_path, ["--partition=gpu"], *words(settings)))
    with subprocess.Popen(["bash", str(script)], stderr=subprocess.PIPE, text=True) as job:
        assert job.stderr is not None
        for said in job.stderr:
            if said.startswith("step 2/"):
                break
        job.send_signal(signal.SIGUSR1)
        job.stderr.read()
        assert job.wait(200) == 0
    assert noted.read_text() == "requeue 77\n"
    assert noted.with_name("noted.cpus").read_text() == "6\n"
    (saved,) = settings.output.glob("checkpoint-*")
    step = int(saved.name.split("-")[1])
    done = settings_of(made, steps=step + 2, save_every=100_000)
    script.write_text(slurm_script(own, tmp_path, [], *words(done)))
    assert subprocess.run(["bash", str(script)], timeout=200).returncode == 0
    assert noted.read_text() == "requeue 77\n", "it is done"
    assert (settings.output / f"checkpoint-{step + 2}").exists()


def test_what_the_script_asks_for(tmp_path: Path) -> None:
    own = Fleet(8, nodes=4, cpu=False)
    text = slurm_script(own, tmp_path, ["--partition=gpu"], "trainer.train", "--config", "a b.json")
    asked = re.findall(r"^#SBATCH (.*)$", text, re.M)
    assert {"--nodes=4", "--ntasks-per-node=1", "--gpus-per-node=8", "--requeue"} <= set(asked)
    assert "--partition=gpu" in asked
    assert "--num_processes=32" in text and '--machine_rank="$SLURM_PROCID"' in text
    assert subprocess.run(["bash", "-n"], input=text, text=True).returncode == 0


# ---------------------------------------------------------------------------- what is started


def test_one_process_needs_no_launcher() -> None:
    assert Fleet().command("trainer.train") == [sys.executable, "-m", "trainer.train"]
    assert Fleet(cpu=False).environment == {}


def test_one_process_without_a_gpu_leaves_it_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "gpus_here", lambda: 8)
    one = fleet(None, 1, 1, None, None, here=True)
    assert one.environment == {"ACCELERATE_USE_CPU": "true"} and not one.launched
    assert by_hand(one, "trainer.train").startswith("ACCELERATE_USE_CPU=true ")
    assert fleet(1, None, 1, None, None, here=True).environment == {}


@pytest.mark.parametrize("signals", [1, 2])
def test_a_signal_while_it_is_started_reaches_it(
    monkeypatch: pytest.MonkeyPatch, signals: int
) -> None:
    started: list[subprocess.Popen[bytes]] = []

    class Interrupted(subprocess.Popen):  # type: ignore[type-arg]
        def __init__(self, *words: Any, **more: Any) -> None:
            super().__init__(*words, **more)
            started.append(self)
            for _ in range(signals):
                os.kill(os.getpid(), signal.SIGTERM)

    def given_up(number: int, frame: Any) -> None:
        raise InterruptedError("as the command does outside of a training")

    before = signal.signal(signal.SIGTERM, given_up)
    monkeypatch.setattr(subprocess, "Popen", Interrupted)
    try:
        code = call([sys.executable, "-c", "import time; time.sleep(600)"])
        assert -code in (signal.SIGTERM, signal.SIGKILL)
        assert signal.getsignal(signal.SIGTERM) is given_up
    finally:
        signal.signal(signal.SIGTERM, before)
        for process in started:
            process.kill()
            process.wait()


def test_gpus_are_started_by_accelerate(tmp_path: Path) -> None:
    made = " ".join(Fleet(8, cpu=False).command("trainer.train"))
    assert "accelerate.commands.launch --multi_gpu" in made
    assert "--num_processes=8 --num_machines=1 --main_process_port=0 " in made
    made = " ".join(Fleet(1, cpu=False, accelerate="fsdp.yaml").command("trainer.train"))
    assert "--config_file=fsdp.yaml" in made and "--multi_gpu" not in made


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"gpus": 64}, "this machine has"),
        ({"gpus": 2, "processes": 2}, "both say how many"),
        ({"accelerate": "missing.yaml"}, "accelerate config --config_file missing.yaml"),
        ({"head": "node0:http", "processes": 1}, "HOST:PORT"),
        ({"head": "node0:295000", "processes": 1}, "below 65536"),
        ({"here": False}, "how many GPUs has a node"),
    ],
)
def test_mistakes_are_told_in_a_sentence(asked: dict[str, Any], told: str) -> None:
    words = {"gpus": None, "processes": None, "nodes": 1, "accelerate": None, "head": None}
    with pytest.raises(ConfigError, match=re.escape(told)):
        fleet(**{**words, "here": True, **asked})


def test_what_would_be_left_out_is_refused() -> None:
    for option, told in (("--head=a", "--launcher print"), ("--sbatch=-q", "--launcher slurm")):
        with pytest.raises(ConfigError, match=told):
            command.main([option], standalone_mode=False)


@pytest.mark.parametrize("name", ["fsdp2", "zero2", "zero3"])
def test_weights_are_spread_by_name(name: str, tmp_path: Path) -> None:
    file = configuration(name, here=False)
    assert file is not None and Path(file).is_absolute()
    made = yaml.safe_load(Path(file).read_text())
    assert made["distributed_type"] == ("FSDP" if name == "fsdp2" else "DEEPSPEED")
    (chosen,) = (made[key] for key in ("fsdp_config", "deepspeed_config") if key in made)
    assert str(chosen.get("zero_stage", chosen.get("fsdp_version"))) == name[-1]


def test_a_configuration_that_cannot_be_used_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "own.yaml"
    for text, told in (("a: [", "cannot be read"), ("a: 1", "no distributed_type")):
        file.write_text(text)
        with pytest.raises(ConfigError, match=told):
            configuration(str(file), here=True)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(ConfigError, match=r"pip install 'vidpipe\[deepspeed\]'"):
        configuration("zero3", here=True)
    assert configuration("zero3", here=False)


def test_there_may_be_no_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="no sbatch"):
        launching.submit(tmp_path / "slurm.sh")
