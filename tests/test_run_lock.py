"""A run folder belongs to one live process: real processes, killed ones, other hosts, races."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from sae import run_lock
from sae.errors import InputError
from sae.run_lock import LOCK, RunLock, owner_of, read_lock

pytestmark = pytest.mark.shapes_unchecked

ROOT = Path(__file__).resolve().parent.parent
HOLD = """
import sys, time
from pathlib import Path
from sae.run_lock import RunLock
RunLock(Path(sys.argv[1])).acquire()
print("owner", flush=True)
time.sleep(60)
"""
RACE = """
import sys, time
from pathlib import Path
from sae.errors import InputError
from sae.run_lock import RunLock
print("ready", flush=True)
sys.stdin.readline()
try:
    RunLock(Path(sys.argv[1])).acquire()
    print("owner", flush=True)
except InputError:
    print("refused", flush=True)
sys.stdin.readline()
"""


def _start(code, folder):
    return subprocess.Popen(
        [sys.executable, "-c", code, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )


@pytest.fixture
def holder(tmp_path):
    """Another process that owns `tmp_path`."""
    process = _start(HOLD, tmp_path)
    assert process.stdout.readline() == "owner\n"
    yield process
    process.kill()
    process.communicate()


def _plant(folder, **changes):
    """The lock of a process on another host."""
    content = {
        "host": "elsewhere",
        "pid": 7,
        "process_started": 1,
        "namespace": None,
        "since": 1.7e9,
    } | changes
    (folder / LOCK).write_text(json.dumps(content))


def _silent_for(path, seconds):
    then = time.time() - seconds
    os.utime(path, (then, then))


def test_a_live_owner_is_named_and_keeps_its_folder(tmp_path, holder):
    before = (tmp_path / LOCK).read_bytes()
    _silent_for(tmp_path / LOCK, 1000)  # on this host the process counts, not the heartbeat
    with pytest.raises(
        InputError, match=rf"belongs to process {holder.pid} on \S+ since 2.*another `trainer"
    ):
        RunLock(tmp_path).acquire()
    assert (tmp_path / LOCK).read_bytes() == before
    assert owner_of(tmp_path).pid == holder.pid


@pytest.mark.parametrize("reaped", [True, False], ids=["reaped", "zombie"])
def test_a_killed_owner_is_followed_at_once(tmp_path, holder, reaped):
    holder.send_signal(signal.SIGKILL)
    if reaped:
        holder.wait()
    else:
        os.waitid(os.P_PID, holder.pid, os.WEXITED | os.WNOWAIT)
    assert owner_of(tmp_path) is None and read_lock(tmp_path).pid == holder.pid
    with RunLock(tmp_path):
        assert owner_of(tmp_path).pid == os.getpid()
    assert read_lock(tmp_path) is None


def test_a_number_used_again_is_not_taken_for_the_owner(tmp_path, holder):
    content = json.loads((tmp_path / LOCK).read_text())
    (tmp_path / LOCK).write_text(json.dumps(content | {"process_started": content["process_started"] - 1}))
    assert owner_of(tmp_path) is None


@pytest.mark.parametrize("stale", [False, True], ids=["no lock", "dead owner"])
@pytest.mark.parametrize("attempt", range(2))
def test_of_racers_exactly_one_wins(tmp_path, stale, attempt):
    if stale:
        _plant(tmp_path)
        _silent_for(tmp_path / LOCK, 100)
    racers = [_start(RACE, tmp_path) for _ in range(4)]
    assert [r.stdout.readline() for r in racers] == ["ready\n"] * 4
    for racer in racers:
        racer.stdin.write("\n")
        racer.stdin.flush()
    said = [racer.stdout.readline() for racer in racers]
    assert sorted(said) == ["owner\n", *["refused\n"] * 3]
    assert owner_of(tmp_path).pid == racers[said.index("owner\n")].pid
    for racer in racers:
        racer.communicate("\n")


def test_another_hosts_owner_lives_as_long_as_its_heartbeat(tmp_path):
    _plant(tmp_path)
    _silent_for(tmp_path / LOCK, 40)
    with pytest.raises(InputError, match=r"process 7 on elsewhere since 2023-11-1.*after 60 s"):
        RunLock(tmp_path).acquire()
    _silent_for(tmp_path / LOCK, 70)
    with RunLock(tmp_path):
        assert owner_of(tmp_path).pid == os.getpid()


def test_a_container_of_the_same_name_is_another_host(tmp_path, monkeypatch):
    _plant(tmp_path, host=run_lock.socket.gethostname(), pid=2**22 + 1, namespace="pid:[1]")
    assert owner_of(tmp_path) is not None


def test_ages_are_by_the_file_systems_clock(tmp_path, monkeypatch):
    _plant(tmp_path)
    monkeypatch.setattr(run_lock.time, "time", lambda: 4e9)  # this machine's clock is far off
    assert owner_of(tmp_path).age_s < 30


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": 3}', '{"host": "x", "pid": "y"}', "\0\xff"])
def test_garbage_is_judged_by_its_age(tmp_path, content):
    (tmp_path / LOCK).write_text(content)
    _silent_for(tmp_path / LOCK, 30)
    with pytest.raises(InputError, match=r"lock\.json does not tell, which is running. .*remove it"):
        RunLock(tmp_path).acquire()
    _silent_for(tmp_path / LOCK, 70)
    with RunLock(tmp_path):
        assert owner_of(tmp_path).pid == os.getpid()


def test_release_removes_only_ones_own_lock(tmp_path):
    lock = RunLock(tmp_path / "new" / "run")
    lock.release()
    lock.acquire()
    lock.acquire()
    _plant(tmp_path / "new" / "run")  # taken over meanwhile
    lock.release()
    assert read_lock(tmp_path / "new" / "run").host == "elsewhere"


def test_the_same_process_does_not_own_a_folder_twice(tmp_path):
    with RunLock(tmp_path), pytest.raises(InputError, match="this very process"):
        RunLock(tmp_path).acquire()
    assert list(tmp_path.iterdir()) == []


def test_the_heart_beats_until_the_release(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT_S", 0.02)
    lock = RunLock(tmp_path)
    lock.acquire()
    _silent_for(tmp_path / LOCK, 1000)
    deadline = time.monotonic() + 60
    while read_lock(tmp_path).age_s > 500 and time.monotonic() < deadline:
        time.sleep(0.02)
    assert read_lock(tmp_path).age_s < 500
    lock.release()
    deadline = time.monotonic() + 60
    while any(t.name == "run lock" for t in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(t.name == "run lock" for t in threading.enumerate())


def test_another_owners_lock_gets_no_heartbeat_of_ours(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT_S", 0.02)
    lock = RunLock(tmp_path)
    lock.acquire()
    _plant(tmp_path)
    _silent_for(tmp_path / LOCK, 1000)
    time.sleep(0.2)
    assert read_lock(tmp_path).age_s > 500
    lock.release()


def test_without_flock_the_last_writer_owns_the_folder(tmp_path, monkeypatch):
    def unknown(*args):
        raise OSError("no locks here")

    monkeypatch.setattr(run_lock, "SETTLE_S", 0.2)
    monkeypatch.setattr(run_lock.fcntl, "flock", unknown)
    _plant(tmp_path)
    _silent_for(tmp_path / LOCK, 100)
    overwriting = threading.Timer(0.1, lambda: _plant(tmp_path))
    overwriting.start()
    with pytest.raises(InputError, match="process 7 on elsewhere"):
        RunLock(tmp_path).acquire()


def test_a_forked_child_does_not_release_its_parents_lock(tmp_path):
    lock = RunLock(tmp_path)
    lock.acquire()
    child = os.fork()
    if child == 0:
        lock.release()
        os._exit(0)
    os.waitpid(child, 0)
    assert owner_of(tmp_path).pid == os.getpid()
    lock.release()


def test_no_folder_has_no_owner(tmp_path):
    assert owner_of(tmp_path / "none") is None and read_lock(tmp_path / "none") is None


def test_a_folder_that_cannot_be_written_is_said(tmp_path, monkeypatch):
    def refuses(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "open", refuses)
    with pytest.raises(
        InputError, match=r"nothing can be written into .*run \(Read-only file system\); give"
    ):
        RunLock(tmp_path / "run").acquire()


def test_a_folder_made_for_the_lock_alone_goes_with_it(tmp_path):
    with RunLock(tmp_path / "runs" / "x"):
        assert (tmp_path / "runs" / "x" / "lock.json").is_file()
    assert list(tmp_path.iterdir()) == []
    with RunLock(tmp_path / "runs" / "x"):
        (tmp_path / "runs" / "x" / "config.yaml").write_text("a run")
    assert [p.name for p in (tmp_path / "runs" / "x").iterdir()] == ["config.yaml"]
