"""A real SLURM of two nodes on this host, from Debian's packages; and what its tests and torchrun's share."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "sbatch", "scontrol", "scancel", "sinfo")
PATH = f"{Path(sys.prefix) / 'bin'}:{os.environ['PATH']}:/usr/sbin"
PATIENCE = 300  # seconds until what a test waits for is taken for hung: two ranks may import for a minute

# Nodes that share an address differ in their ports. No cgroups, no accounting, no user but that of the tests.
CONF = """\
ClusterName=tests
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
SwitchType=switch/none
ReturnToService=2
JobRequeue=1
SchedulerParameters=sched_interval=2,bf_interval=2
MinJobAge=3600
KillWait={kill_wait}
SlurmdParameters=config_overrides
PropagateResourceLimitsExcept=MEMLOCK
NodeName=n[1-2] NodeHostname={host} NodeAddr=127.0.0.1 Port=[{ports[1]}-{ports[2]}] CPUs=2 State=UNKNOWN
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=INFINITE State=UP
"""


def _wait_for(condition, what, seconds=PATIENCE):
    """What `condition` returns once that is something; AssertionError with `what()` after `seconds`."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if value := condition():
            return value
        time.sleep(0.1)
    raise AssertionError(f"not within {seconds} s: {what() if callable(what) else what}")


def _free_ports(count):
    """Consecutive ports that nobody listens on, below those that the system hands out by itself."""
    for first in range(16000 + os.getpid() % 3000, 20000, count):
        with contextlib.suppress(OSError), contextlib.ExitStack() as held:
            for port in range(first, first + count):
                held.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return list(range(first, first + count))
    raise AssertionError("no free ports")


def _environment(**more):
    """For processes that find each other over loopback; none of them thinks it is in a job."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "MASTER_", "SAE_"))}
    ours = {"PATH": PATH, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    return inherited | ours | more


def _words(path: Path) -> list[str]:
    """The NUL-separated words of a file of /proc; nothing where the process has ended."""
    try:
        return path.read_text(errors="replace").split("\0")
    except OSError:
        return [""]


def _variables(process: Path) -> dict[str, str]:
    """The environment that a process was started with."""
    return dict(word.split("=", 1) for word in _words(process / "environ") if "=" in word)


class Slurm:
    """munged, slurmctld and two slurmd of our own, with all they write in one folder."""

    TWO_NODES = ("--nodes=2", "--ntasks-per-node=1")
    KILL_WAIT = 15  # seconds from SIGTERM to SIGKILL; 30 where nobody sets it

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.env = _environment(
            SLURM_CONF=str(folder / "slurm.conf"),
            MASTER_ADDR="127.0.0.1",  # n1 and n2 are no names that resolve
        )
        if (Path(sys.prefix) / "bin" / "activate").is_file():
            self.env["SAE_VENV"] = sys.prefix

    def start(self) -> None:
        for name in ("munge", "state", "log", "spool"):
            (self.folder / name).mkdir()
        (self.folder / "munge").chmod(0o711)
        key = self.folder / "munge" / "key"
        key.touch(0o600)
        key.write_bytes(os.urandom(1024))
        files = {
            "socket": "socket",
            "key-file": "key",
            "pid-file": "pid",
            "log-file": "log",
            "seed-file": "seed",
        }
        # --force: below /tmp, which anyone may write to
        self._call("munged", "--force", *(f"--{k}={self.folder}/munge/{v}" for k, v in files.items()))
        text = CONF.format(
            host=socket.gethostname().split(".")[0],
            ports=_free_ports(3),
            folder=self.folder,
            kill_wait=self.KILL_WAIT,
        )
        (self.folder / "slurm.conf").write_text(text)
        self._call("slurmctld")
        for node in ("n1", "n2"):
            self._call("slurmd", "-N", node)
        _wait_for(lambda: set(self._call("sinfo", "-h", "-N", "-o", "%T").split()) == {"idle"}, self._logs)

    def stop(self) -> None:
        """Cancels what runs, and ends the daemons by their pid files."""
        with contextlib.suppress(AssertionError, subprocess.SubprocessError):
            self._call("scancel", "--user=root")
            self._call("scancel", "--user=root", "--signal=KILL")
            _wait_for(lambda: not self._call("squeue", "-h"), "all jobs end", self.KILL_WAIT + 30)
        for path in [*self.folder.glob("*.pid"), self.folder / "munge" / "pid"]:
            with contextlib.suppress(OSError, ValueError):
                os.kill(int(path.read_text()), signal.SIGTERM)

    def _call(self, *command: str) -> str:
        done = subprocess.run(
            command,
            env=self.env,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}{self._logs()}"
        return done.stdout.strip()

    def _logs(self) -> str:
        logs = [*self.folder.glob("log/*"), self.folder / "munge" / "log"]
        return "".join(f"\n{p.name}: {p.read_text()[-2000:]}" for p in logs if p.is_file())

    def submit(self, script, *arguments, options=(), **more) -> Job:
        """sbatch scripts/slurm/SCRIPT.sbatch ARGUMENTS from the clone's folder."""
        output = self.folder / f"{script}-%j.out"
        command = ["sbatch", "--parsable", f"--output={output}", *options, f"scripts/slurm/{script}.sbatch"]
        kept, self.env = self.env, self.env | more
        try:
            return Job(self, self._call(*command, *map(str, arguments)), script)
        finally:
            self.env = kept


class Job:
    """A job, or a task of an array ("7_2")."""

    def __init__(self, slurm: Slurm, number: str, script: str) -> None:
        self.slurm, self.number, self.script = slurm, number, script

    def task(self, index: int) -> Job:
        return Job(self.slurm, f"{self.number}_{index}", self.script)

    def facts(self) -> dict[str, str]:
        """What `scontrol show job` says."""
        text = self.slurm._call("scontrol", "show", "job", "-o", self.number)
        return dict(re.findall(r"(\w+)=(\S*)", text))

    @property
    def output(self) -> str:
        """What it has printed so far, restarts included."""
        path = self.slurm.folder / f"{self.script}-{self.facts()['JobId']}.out"
        return path.read_text(errors="replace") if path.is_file() else ""

    def wait(self, *states: str, seconds: float = PATIENCE) -> dict[str, str]:
        """Waits until it is in one of the states."""

        def arrived():
            facts = self.facts()
            ended = facts["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL")
            if facts["JobState"] in states:
                return facts
            assert not ended, f"job {self.number} is {facts['JobState']} and not {states}:\n{self.output}"
            return None

        return _wait_for(arrived, lambda: f"{states}: {self.facts()}\n{self.output}", seconds)

    def await_deaf(self, program: str) -> None:
        """Waits until every rank holds signals back, or handles them: they no longer kill it."""

        def deaf():
            status = [_words(Path(f"/proc/{pid}/status"))[0] for pid in self.pids(program).values()]
            masks = [re.findall(r"Sig(?:Blk|Cgt):\t(\w+)", text) for text in status]
            bit = 1 << signal.SIGUSR1 - 1
            return len(masks) == 2 and all(any(int(mask, 16) & bit for mask in two) for two in masks)

        _wait_for(deaf, lambda: f"ranks that hold SIGUSR1 back: {self.facts()}\n{self.output}")

    def signal(self, name: str) -> None:
        """scancel --signal: to every task of the step."""
        self.slurm._call("scancel", f"--signal={name}", self.number)

    def requeue(self) -> None:
        """What an administrator or a preempting job does: SIGTERM, and the job is queued again."""
        self.slurm._call("scontrol", "requeue", self.number)

    def release(self) -> None:
        """Starts a requeued job now: SLURM itself waits two minutes."""
        self.slurm._call("scontrol", "update", f"JobId={self.number}", "StartTime=now")

    def pids(self, program: str = "train.py") -> dict[int, int]:
        """Process id of each rank."""
        found = {}
        for process in Path("/proc").glob("[0-9]*"):
            words, values = _words(process / "cmdline"), _variables(process)
            ours = values.get("SLURM_CONF") == self.slurm.env["SLURM_CONF"]  # and no other cluster's job 3
            its = values.get("SLURM_JOB_ID") == self.number and "SLURM_PROCID" in values
            if ours and its and "python" in words[0] and any(word.endswith(program) for word in words):
                found[int(values["SLURM_PROCID"])] = int(process.name)
        return found


def _reason_without_slurm() -> str:
    """Why there can be no cluster here; empty where there can."""
    missing = [program for program in PROGRAMS if shutil.which(program, path=PATH) is None]
    if missing:
        return f"no {', '.join(missing)}: apt-get install slurmctld slurmd slurm-client munge"
    return "" if os.getuid() == 0 else "slurmd starts jobs only as root"


@pytest.fixture(scope="session")
def slurm(tmp_path_factory):
    """The cluster; skips where the packages are not installed."""
    if reason := _reason_without_slurm():
        pytest.skip(reason)
    cluster = Slurm(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


class LongRun:
    """A configuration that takes two ranks some ten seconds, to be interrupted in; and its run folders."""

    STEPS = 800
    EVERY = 100  # steps between checkpoints

    def __init__(self, config: Path) -> None:
        self.config = config

    def arguments(self, name: str, *more: str) -> list[str]:
        """For train.py, of a run in the folder `name`."""
        return [
            "--config",
            str(self.config),
            f"--checkpoint_every={self.EVERY}",
            f"--trainer.default_root_dir={self.folder(name)}",
            *more,
        ]

    def folder(self, name: str) -> Path:
        return self.config.parent / name

    def saved_step(self, name: str) -> int:
        """The step of last.ckpt; 0 where there is none."""
        path = self.folder(name) / "checkpoints" / "last.ckpt"
        with contextlib.suppress(
            FileNotFoundError
        ):  # as it is for a moment when the next one takes its place
            return torch.load(path, weights_only=True)["global_step"]
        return 0

    def await_checkpoint(self, name: str, step: int) -> None:
        """Waits for a checkpoint of that step or a later one."""
        _wait_for(lambda: self.saved_step(name) >= step, f"{name}: a checkpoint of step {step}")

    def metrics(self, name: str) -> dict:
        return json.loads((self.folder(name) / "metrics.json").read_text())

    def weights(self, name: str) -> dict[str, torch.Tensor]:
        return load_file(self.folder(name) / "dictionary" / "weights.safetensors")

    def curve(self, name: str, tag: str) -> list[tuple[int, float]]:
        """Every point that was written, those too that a later session has written again."""
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        folder = self.folder(name) / "tensorboard"
        assert {path.parent for path in folder.rglob("events*")} == {folder}, "more than one stream"
        events = EventAccumulator(str(folder), {"scalars": 0}, purge_orphaned_data=False).Reload()
        return [(event.step, event.value) for event in events.Scalars(tag)]

    def check_equal(self, name: str, other: str) -> None:
        """The same weights, bit for bit, and both finished."""
        for run in (name, other):
            metrics = self.metrics(run)
            assert metrics["finished"] and metrics["steps"] == self.STEPS
        ours, theirs = self.weights(name), self.weights(other)
        assert set(ours) == set(theirs)
        for key, tensor in theirs.items():
            assert torch.equal(ours[key], tensor), f"{key} differs by {(ours[key] - tensor).abs().max()}"


@pytest.fixture(scope="session")
def long_run(tmp_path_factory, write_config) -> LongRun:
    path = write_config(
        tmp_path_factory.mktemp("long"),
        max_steps=LongRun.STEPS,
        val_check_interval=LongRun.STEPS // 2,
        log_every_n_steps=1,
        enable_progress_bar=True,
        callbacks=[],
    )
    values = yaml.safe_load(path.read_text())
    values["model"]["dictionary"]["init_args"] = {"n_latents": 256, "k": 4}
    path.write_text(yaml.safe_dump(values))
    return LongRun(path)


@pytest.fixture(scope="session")
def launch():
    """Starts train.py outside SLURM; what still runs at the end of the tests is killed."""
    started = []

    def start(output: Path, *arguments: str, torchrun: Sequence[str] | None = None) -> subprocess.Popen:
        """One process, or two workers where `torchrun` has its options."""
        ranks = ["train.py", "--trainer.devices=1"]
        if torchrun is not None:
            options = ["--nproc-per-node=2", "--monitor-interval=0.2", *torchrun]
            ranks = ["-m", "torch.distributed.run", *options, "train.py", "--trainer.devices=2"]
        with output.open("w") as file:
            process = subprocess.Popen(
                [sys.executable, *ranks, *arguments],
                # Restarted workers must not find the addresses of those that died.
                env=_environment(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1"),
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
            )
        started.append(process)
        return process

    yield start
    for process in started:
        for pid in [*_workers(process), process.pid]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        process.wait(10)


def _workers(process: subprocess.Popen) -> list[int]:
    """Process ids of the workers that a torchrun has now, by rank."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    pids = children.read_text().split() if children.is_file() else []
    ranks = {int(pid): _variables(Path("/proc") / pid).get("RANK") for pid in pids}
    return sorted((pid for pid, rank in ranks.items() if rank is not None), key=lambda pid: int(ranks[pid]))


@pytest.fixture(scope="session")
def workers_of():
    return _workers


@pytest.fixture(scope="session")
def unbroken(request, long_run, launch) -> str:
    """The long run on two ranks, never interrupted: what all others have to equal.

    On two nodes where there is a SLURM, under torchrun elsewhere: the same weights, as the tests show.
    """
    if _reason_without_slurm():
        output = long_run.folder("unbroken.log")
        process = launch(output, *long_run.arguments("unbroken"), torchrun=["--standalone"])
        assert process.wait(PATIENCE) == 0, output.read_text()
    else:
        slurm = request.getfixturevalue("slurm")
        job = slurm.submit("train", *long_run.arguments("unbroken"), options=slurm.TWO_NODES)
        facts = job.wait("COMPLETED")
        assert (facts["ExitCode"], facts["NumNodes"], facts["Restarts"]) == ("0:0", "2", "0")
        assert job.output.count("holds metrics.json") == 1  # the last line of a run, from one rank
    return "unbroken"
