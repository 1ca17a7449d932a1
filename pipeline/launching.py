"""How the trainer's processes are started: one, several on this machine, or on many nodes.

Several are started by a launcher: accelerate's where there are GPUs, with its own configuration for
FSDP and DeepSpeed; PyTorch's where there are none, as accelerate starts but one process on CPUs.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

import yaml

from pipeline.config import ConfigError
from pipeline.resources import cores, gpus_here

TRAINER = "trainer.train"
LAUNCH = "trainer.launch"  # ends as the processes that a launcher starts
DEFAULT_PORT = 29500  # that the first of several nodes listens on
# What a launcher that is told to stop gives its processes to save: PyTorch's own is 30 s.
SAVING_SECONDS = 1800
# PyTorch would leave a folder for the processes' logs in the system's temporary one; these log to
# where this one does.
NO_LOGS = f"--log_dir={os.devnull}"
# Before Slurm's time is up.
NOTICE_SECONDS = 600
# In the commands of nodes, until they are known.
RANK, HEAD, PORT = "@RANK@", "@HEAD@", "@PORT@"
FREE_PORT = "import socket; s = socket.create_server((str(), 0)); print(s.getsockname()[1])"


@dataclass(frozen=True)
class Fleet:
    """The processes of a training run: on each of `nodes`, a GPU each or none. `accelerate` is the
    file of its configuration."""

    processes: int = 1
    nodes: int = 1
    cpu: bool = True
    accelerate: str | None = None
    head: str = ""  # host of the first node
    port: int = DEFAULT_PORT

    @property
    def launched(self) -> bool:
        """Whether a launcher has to start them."""
        return self.processes * self.nodes > 1 or self.accelerate is not None

    @property
    def environment(self) -> dict[str, str]:
        """What the processes' environment needs beside what it has."""
        device = {"ACCELERATE_USE_CPU": "true"} if self.cpu else {}  # else it takes a GPU if it can
        if not self.launched:
            return device
        threads = str(max(1, cores() // self.processes)) if self.cpu else "1"
        return {
            "TORCH_ELASTIC_SHUTDOWN_TIMEOUT": str(SAVING_SECONDS),
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads),
            **device,
        }

    def command(self, *trainer: str) -> list[str]:
        """Runs a module of the trainer on one node; `RANK`, `HEAD` and `PORT` stand for what is
        not known yet where there are several."""
        if not self.launched:
            return [sys.executable, "-m", *trainer]
        several = self.nodes > 1
        if self.cpu and self.accelerate is None:
            there = [f"--nnodes={self.nodes}", f"--node-rank={RANK}", f"--master-addr={HEAD}"]
            place = [*there, f"--master-port={PORT}"] if several else ["--standalone"]
            each = f"--nproc-per-node={self.processes}"
            launcher = ["torch.distributed.run", each, NO_LOGS, *place]
        else:
            place = [f"--main_process_port={PORT if several else 0}"]  # 0: any that is free
            if several:
                place += [f"--machine_rank={RANK}", f"--main_process_ip={HEAD}"]
            kind = (
                [f"--config_file={self.accelerate}"]
                if self.accelerate
                else ["--multi_gpu", "--mixed_precision=no", "--dynamo_backend=no"]
            )
            total = self.processes * self.nodes
            launcher = [
                "accelerate.commands.launch",
                *kind,
                f"--num_processes={total}",
                f"--num_machines={self.nodes}",
                *place,
                NO_LOGS,
            ]
        return [sys.executable, "-m", LAUNCH, *launcher, "-m", *trainer]


def fleet(
    gpus: int | None,
    processes: int | None,
    nodes: int,
    accelerate: str | None,
    head: str | None,
    here: bool,
) -> Fleet:
    """By the options of `vidpipe train`; `here`: it is to run on this machine. Raises
    ConfigError."""
    if gpus is not None and processes is not None:
        raise ConfigError("--gpus and --processes both say how many: --processes is for CPUs")
    accelerate = configuration(accelerate, here)
    host, _, port = (head or "").partition(":")
    if port and not (port.isdecimal() and 0 < int(port) < 1 << 16):
        raise ConfigError(f"--head {head}: HOST or HOST:PORT is expected, a port below 65536")
    made = Fleet(1, nodes, True, accelerate, host, int(port or DEFAULT_PORT))
    if processes is not None:
        return replace(made, processes=processes)
    there = gpus_here() if here else None
    if gpus is None:
        if there is None:
            raise ConfigError("how many GPUs has a node? --gpus N, or --processes N without any")
        return replace(made, processes=max(1, there), cpu=not there)
    if there is not None and gpus > there:
        raise ConfigError(
            f"--gpus {gpus}: this machine has {there}. Leave --gpus out to use what there is; "
            "--processes trains on CPUs."
        )
    return replace(made, processes=gpus, cpu=False)


def configuration(chosen: str | None, here: bool) -> str | None:
    """The file of accelerate's configuration that `--accelerate` names. Raises ConfigError where it
    cannot be used, on this machine (`here`) or at all."""
    if chosen is None:
        return None
    made = {path.stem: path for path in Path(__file__).with_name("accelerate").glob("*.yaml")}
    path = made.get(chosen, Path(chosen))
    try:
        asked = yaml.safe_load(path.read_bytes())
    except FileNotFoundError as error:
        raise ConfigError(
            f"--accelerate {chosen}: there is no such file. There are {', '.join(sorted(made))}, "
            f"and `accelerate config --config_file {chosen}` makes one of your own."
        ) from error
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(f"--accelerate {chosen} cannot be read: {error}") from error
    kind = asked.get("distributed_type") if isinstance(asked, dict) else None
    if kind is None:
        raise ConfigError(
            f"--accelerate {chosen} says no distributed_type: `accelerate config --config_file "
            f"{chosen}` makes a configuration"
        )
    if here and kind == "DEEPSPEED" and importlib.util.find_spec("deepspeed") is None:
        raise ConfigError(
            f"--accelerate {chosen} asks for DeepSpeed, which is not installed: "
            "pip install 'vidpipe[deepspeed]', or --accelerate fsdp2"
        )
    return str(path.resolve())


def call(command: Sequence[str], environment: Mapping[str, str] = {}) -> int:
    """Runs it to its end; returns its exit code. Ctrl-C, SIGTERM and SIGHUP are handed to the
    trainer's processes as SIGTERM, whereupon they save; a second one ends all at once."""
    asked = told = 0
    process: subprocess.Popen[bytes] | None = None

    def hand_on() -> None:
        nonlocal told
        while process is not None and told < asked:
            told += 1
            # They have sessions of their own: whoever kills the launcher leaves them behind.
            for pid in (*trainers(process.pid), *([process.pid] if told > 1 else [])):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL if told > 1 else signal.SIGTERM)

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked += 1
        hand_on()

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    # nohup has the trainer outlive its terminal
    heard = [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in heard}
    try:
        # In a session of its own: of a terminal's Ctrl-C the launcher would hear, too, and end.
        with subprocess.Popen(
            command, env={**os.environ, **environment}, start_new_session=True
        ) as process:
            hand_on()  # what was asked while it was started
            return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def trainers(pid: int) -> list[int]:
    """The processes that train: those that the launcher `pid` has started, or itself."""
    return [child for child in _children(pid) if _trains(child)] or [pid]


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(OSError):  # it is gone
        for listed in Path(f"/proc/{pid}/task").glob("*/children"):
            found += map(int, listed.read_text().split())
    return found


def _trains(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return TRAINER in Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    return False


def by_hand(fleet: Fleet, *trainer: str) -> str:
    """What is to be run on each node, as lines for a shell."""
    if not fleet.head and fleet.nodes > 1:
        raise ConfigError("--launcher print of several nodes needs --head HOST, the first of them")
    lines = []
    for rank in range(fleet.nodes):
        if fleet.nodes > 1:
            lines.append(f"# node {rank}")
        line = _shell(fleet, *trainer).replace(RANK, str(rank)).replace(PORT, str(fleet.port))
        line = line.replace(HEAD, shlex.quote(fleet.head))
        if fleet.nodes > 1 and rank == 0:
            line = f"{shlex.quote(sys.executable)} -m pipeline.port {fleet.port} && {line}"
        lines.append(line)
    return "\n".join(lines) + "\n"


def _shell(fleet: Fleet, *trainer: str) -> str:
    values = (f"{name}={shlex.quote(value)}" for name, value in fleet.environment.items())
    return " ".join([*values, shlex.join(fleet.command(*trainer))])


def slurm_script(fleet: Fleet, folder: Path, directives: Sequence[str], *trainer: str) -> str:
    """A batch script: the trainer saves before the time is up, and the job queues itself again."""
    own = [
        "--job-name=vidpipe-train",
        f"--nodes={fleet.nodes}",
        "--ntasks-per-node=1",
        *([] if fleet.cpu else [f"--gpus-per-node={fleet.processes}"]),
        f"--output={shlex.quote(f'{folder}/slurm-%j.log')}",
        "--open-mode=append",
        "--requeue",
        f"--signal=B:USR1@{NOTICE_SECONDS}",
        *directives,
    ]
    quiet = "trap '' TERM; export PET_SIGNALS_TO_HANDLE=SIGINT; " * fleet.launched
    node = _shell(fleet, *trainer).replace(RANK, '"$SLURM_PROCID"')
    node = node.replace(HEAD, '"$HEAD"').replace(PORT, '"$PORT"')
    port = (
        f"export PORT=$({shlex.join([sys.executable, '-c', FREE_PORT])})  # this is the first node"
    )
    return "\n".join(
        [
            "#!/bin/bash",
            *(f"#SBATCH {directive}" for directive in own),
            "",
            f"cd {shlex.quote(str(Path.cwd()))}",
            'export HEAD=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
            *([port] if fleet.nodes > 1 else []),
            "# srun does not take over by itself what --sbatch=--cpus-per-task=N gives the job.",
            'if [ -n "$SLURM_CPUS_PER_TASK" ]; then',
            '    export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"',
            "fi",
            "# Slurm tells some minutes before the time is up, and when it takes the nodes away.",
            "# scancel hands it on to the trainers; srun would kill them at a SIGTERM of its own.",
            "again=",
            "trap 'again=1; scancel --signal=TERM \"$SLURM_JOB_ID\"' USR1",
            "trap 'scancel --signal=TERM \"$SLURM_JOB_ID\"' TERM",
            "# The launcher would hear the SIGTERM, too, and count it a failure.",
            f"srun --kill-on-bad-exit=1 bash -c {shlex.quote(f'{quiet}exec env {node}')} &",
            "step=$!",
            'while wait "$step"; code=$?; kill -0 "$step" 2>/dev/null; do :; done',
            'if [ -n "$again" ]; then scontrol requeue "$SLURM_JOB_ID"; exit 0; fi',
            'exit "$code"',
            "",
        ]
    )


def submit(script: Path) -> int:
    """Hands it to Slurm. Raises ConfigError where there is none."""
    try:
        return subprocess.run(["sbatch", str(script)], check=False).returncode
    except FileNotFoundError as error:
        raise ConfigError(
            f"--submit: there is no sbatch on this machine. Run it where there is: sbatch {script}"
        ) from error
