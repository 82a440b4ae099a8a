"""Processes that are stopped or killed, alone and under torchrun: they come to the same weights."""

import os
import re
import signal
import socket
import time

import pytest

pytestmark = pytest.mark.cluster
STANDALONE = "--standalone"
SAME = 30  # steps
PATIENCE = 300  # seconds until a process is taken for hung


def test_ranks_take_the_steps_of_one_process_and_sigterm_stops_it(launch, long_run, unbroken):
    output = long_run.folder("alone.log")
    process = launch(output, *long_run.arguments("alone"))
    long_run.await_checkpoint("alone", long_run.EVERY)
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE) == 128 + signal.SIGTERM, output.read_text()
    (step,) = re.findall(r"stopped by SIGTERM after step ([\d,]+)", output.read_text())
    assert long_run.saved_step("alone") == int(step.replace(",", ""))
    # Later on the rounding of the sums over ranks, about 1e-7, has grown as any perturbation of Adam does.
    ours, theirs = (long_run.curve(name, "train/fvu")[:SAME] for name in ("alone", unbroken))
    assert [step for step, _ in ours] == list(range(SAME))
    assert [fvu for _, fvu in ours] == pytest.approx([fvu for _, fvu in theirs], rel=1e-5)


def test_killed_worker_ends_the_run_and_restarts_resume_it(launch, workers_of, long_run, unbroken):
    output = long_run.folder("elastic.log")
    process = launch(output, *long_run.arguments("elastic"), torchrun=[STANDALONE])
    long_run.await_checkpoint("elastic", long_run.EVERY)
    pids, begin = workers_of(process), time.monotonic()
    os.kill(pids[1], signal.SIGKILL)
    assert process.wait(60) != 0, output.read_text()
    assert time.monotonic() - begin < 60 and not any(os.path.exists(f"/proc/{pid}") for pid in pids)
    saved = long_run.saved_step("elastic")

    process = launch(output, *long_run.arguments("elastic"), torchrun=[STANDALONE, "--max-restarts=2"])
    long_run.await_checkpoint("elastic", saved + long_run.EVERY)
    os.kill(workers_of(process)[1], signal.SIGKILL)
    assert process.wait(PATIENCE) == 0, output.read_text()
    assert output.read_text().count("resuming from") == 2  # once in each attempt
    long_run.check_equal("elastic", unbroken)


def test_port_in_use_is_a_clear_error(launch, long_run):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        output = long_run.folder("port.log")
        process = launch(output, *long_run.arguments("port"), torchrun=[f"--master-port={port}"])
        assert process.wait(PATIENCE) != 0
    text = output.read_text()  # torchrun itself says it: it listens there before it starts a worker
    assert "EADDRINUSE" in text and str(port) in text
    assert not long_run.folder("port").exists()
