"""The batch scripts on a real SLURM of two nodes: training, preemption, failure, harvest and sweep."""

import json
import os
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.cluster
ROOT = Path(__file__).resolve().parents[2]


def _stops(output, signal_name):
    """The steps after which a run says that it was stopped by that signal; one rank says it."""
    return [int(step) for step in re.findall(rf"stopped by {signal_name} after step ([\d,]+)", output)]


def test_usr1_and_requeue_lose_no_step(slurm, long_run, unbroken, tmp_path):
    # A controller that is busy: the ranks that do not requeue the job must not end it meanwhile.
    slow = tmp_path / "scontrol"
    slow.write_text(f'#!/bin/sh\nsleep 2\nexec {shutil.which("scontrol")} "$@"\n')
    slow.chmod(0o755)
    job = slurm.submit(
        "train",
        *long_run.arguments("preempted", "--fresh"),  # meant once, not after each preemption
        options=slurm.TWO_NODES,
        PATH=f"{tmp_path}:{slurm.env['PATH']}",
    )

    long_run.await_checkpoint("preempted", long_run.EVERY)
    job.signal("USR1")
    job.wait("PENDING")
    (first,) = _stops(job.output, "SIGUSR1")
    assert long_run.saved_step("preempted") == first
    job.release()

    long_run.await_checkpoint("preempted", first + long_run.EVERY)
    job.requeue()
    job.wait("PENDING")
    (second,) = _stops(job.output, "SIGTERM")
    assert long_run.saved_step("preempted") == second > first
    job.release()

    assert job.wait("COMPLETED")["Restarts"] == "2"
    long_run.check_equal("preempted", unbroken)
    # Every step once, with the same loss: neither repeated nor left out.
    assert long_run.curve("preempted", "train/fvu") == long_run.curve(unbroken, "train/fvu")


def test_a_rank_that_dies_fails_the_job_within_a_minute(slurm, long_run):
    job = slurm.submit("train", *long_run.arguments("killed"), options=slurm.TWO_NODES)
    long_run.await_checkpoint("killed", long_run.EVERY)
    ranks = job.pids()
    assert set(ranks) == {0, 1}, ranks
    begin = time.monotonic()
    os.kill(ranks[1], signal.SIGKILL)
    facts = job.wait("FAILED", seconds=60)
    assert facts["ExitCode"] != "0:0" and time.monotonic() - begin < 60
    assert job.pids() == {}


def test_bad_input_fails_the_job_with_one_message(slurm, long_run):
    job = slurm.submit("train", *long_run.arguments("bad", "--model.nonsense=1"), options=slurm.TWO_NODES)
    facts = job.wait("FAILED")
    assert facts["ExitCode"] == "2:0", job.output
    assert job.output.count("nonsense") == 1 and "Traceback" not in job.output
    assert not long_run.folder("bad").exists()


def test_nodes_harvest_the_same_bytes_and_an_early_signal_is_not_lost(slurm, long_run, tiny_cache, tmp_path):
    job = slurm.submit(
        "harvest",
        *("--config", long_run.config, f"--data.cache={tmp_path}/cache"),
        options=slurm.TWO_NODES,
    )
    job.await_deaf("cache_activations.py")  # while it imports
    job.signal("USR1")
    job.wait("PENDING")
    assert job.output.count("stopped by SIGUSR1") == 1
    job.release()
    assert job.wait("COMPLETED")["Restarts"] == "1"

    def files(folder):
        manifest = json.loads((Path(folder) / "manifest.json").read_text())
        return [(entry["file"], entry["checksum"]) for entry in manifest["shards"] + manifest["files"]]

    assert files(tmp_path / "cache") == files(tiny_cache.location)


def test_sweep_trains_each_line_and_a_task_requeues_only_itself(slurm, long_run):
    folder = long_run.folder("sweep")
    folder.mkdir()
    lines = [
        "--model.dictionary.init_args.k 2  --trainer.max_steps 100",
        "# a comment: trains nothing",
        f"'{long_run.config}' --model.dictionary.init_args.k 3 --trainer.max_steps 400",
    ]
    (folder / "ks.txt").write_text("\n".join(lines) + "\n")
    arguments = [folder / "ks.txt", *long_run.arguments("sweep")[:-1]]
    job = slurm.submit("sweep", *arguments, options=("--array=1-3", f"--chdir={folder}"))
    tasks = {number: job.task(number) for number in (1, 2, 3)}
    long_run.await_checkpoint("sweep/runs/ks/3", long_run.EVERY)
    tasks[3].signal("USR1")
    tasks[3].wait("PENDING")
    tasks[3].release()
    for number, task in tasks.items():
        assert task.wait("COMPLETED")["Restarts"] == ("1" if number == 3 else "0")
    for number, k, steps in ((1, 2, 100), (3, 3, 400)):
        metrics = long_run.metrics(f"sweep/runs/ks/{number}")
        assert metrics["finished"] and metrics["steps"] == steps and metrics["l0"] <= k
    assert "trains nothing" in tasks[2].output


def test_port_that_is_in_use_is_said_before_anything_starts(slurm, long_run):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        job = slurm.submit("train", *long_run.arguments("port"), MASTER_PORT=str(port))
        assert job.wait("FAILED")["ExitCode"] == "2:0"
    assert f"MASTER_PORT={port} is in use" in job.output


def _bare(script, path, tmp_path):
    """Runs a batch script without sbatch, with these programs on PATH."""
    env = {"PATH": str(path)}
    command = [shutil.which("bash"), str(ROOT / "scripts" / "slurm" / f"{script}.sbatch"), "--config", "x"]
    return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=20)


@pytest.mark.parametrize("script", ["train", "harvest", "sweep"])
def test_without_srun_the_scripts_say_what_else_to_run(script, tmp_path):
    done = _bare(script, tmp_path, tmp_path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: srun is not on PATH") and "torchrun" in done.stderr
    (tmp_path / "srun").touch(0o755)
    done = _bare(script, tmp_path, tmp_path)
    assert done.returncode == 2 and f"sbatch scripts/slurm/{script}.sbatch" in done.stderr
