"""The table of runs: every state, broken files, names, and that it comes without torch."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sae.errors import InputError
from sae.run_lock import RunLock
from sae.status import as_json, find_runs, read_row, rows_of, table

pytestmark = pytest.mark.shapes_unchecked

ROOT = Path(__file__).resolve().parent.parent
PROGRESS = {
    "state": "running",
    "why": None,
    "step": 500,
    "max_steps": 2000,
    "time": 1.7e9,
    "steps_per_s": 10.0,
    "tokens_per_s": 20_480.0,
    "data_wait": 0.01,
    "memory_bytes": 10**9,
    "metrics": {"train/fvu": 0.25, "train/l0": 16.0, "train/dead_fraction": 0.125, "val/fvu": 0.3},
}


def _run(folder, progress=None, metrics=None, config="trainer: {max_steps: 2000}\n", dead_lock=False):
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config)
    for name, values in (("progress.json", progress), ("metrics.json", metrics)):
        if values is not None:
            (folder / name).write_text(values if isinstance(values, str) else json.dumps(values))
    if dead_lock:
        (folder / "lock.json").write_text(json.dumps({"host": "gone", "pid": 1, "since": 1.6e9}))
        os.utime(folder / "lock.json", (1.6e9, 1.6e9))
    return folder


def test_a_live_run_shows_where_it_stands_and_how_long_it_takes(tmp_path):
    run = _run(tmp_path / "a", PROGRESS, {"finished": False, "steps": 400, "fvu": 0.31, "l0": 15.5})
    with RunLock(run):
        row = read_row(run)
        assert (row.state, row.step, row.max_steps, row.left_s) == ("running", 500, 2000, 150)
        assert row.train == {"fvu": 0.25, "l0": 16.0, "dead_fraction": 0.125}
        assert row.held_out == {"fvu": 0.3, "l0": 15.5, "dead_fraction": None}
        assert row.age_s < 60 and row.owner.startswith(f"process {os.getpid()} on ")
        line = table([row]).splitlines()[1].split()
    assert line[:11] == ["a", "running", "500/2,000", "20.5k", "tok/s", "2m30", "0.2500", "16", "12.5%",
                         "0.3000", "15.5"]  # fmt: skip


@pytest.mark.parametrize(
    ("said", "scores", "owned", "state"),
    [
        ({"state": "starting"}, None, True, "starting"),
        ({"state": "running"}, None, True, "running"),
        ({"state": "running"}, None, False, "dead"),
        ({"state": "starting"}, {"finished": True, "steps": 2000}, False, "finished"),
        ({"state": "running"}, {"finished": True, "steps": 1000}, False, "dead"),  # on its way to more steps
        ({"state": "stopped", "why": "a signal"}, {"finished": False}, False, "stopped"),
        ({"state": "failed", "why": "loss is NaN"}, None, False, "failed"),
        ({"state": "finished"}, {"finished": True}, False, "finished"),
        ({"state": "finished", "time": 4e9}, {"finished": True}, True, "finished"),  # writes its report
        ({"state": "stopped", "time": 1.0}, None, True, "starting"),  # the same command again
        (None, {"finished": True, "steps": 2000}, False, "finished"),
        (None, {"finished": False, "steps": 20}, False, "stopped"),
        (None, None, True, "running"),
        (None, None, False, "?"),
    ],
)
def test_states(tmp_path, said, scores, owned, state):
    run = _run(tmp_path / "a", None if said is None else PROGRESS | said, scores)
    lock = RunLock(run)
    if owned:
        lock.acquire()
    row = read_row(run)
    lock.release()
    assert row.state == state
    assert (row.left_s is not None) == (state in ("running", "starting") and row.steps_per_s is not None)
    if said and said.get("why"):
        assert said["why"] in table([row])


def test_a_dead_lock_tells_dead_runs_without_progress(tmp_path):
    assert read_row(_run(tmp_path / "a", dead_lock=True)).state == "dead"
    assert read_row(_run(tmp_path / "b", PROGRESS, dead_lock=True)).state == "dead"


@pytest.mark.parametrize(
    ("files", "says"),
    [
        ({"progress": '{"state": "run'}, "progress.json cannot be read"),
        ({"progress": "[1]"}, "progress.json holds list"),
        ({"progress": "\0"}, "progress.json cannot be read"),
        ({"progress": "[" * 100_000}, "progress.json cannot be read"),
        ({"metrics": "nan"}, "metrics.json cannot be read"),
        ({"config": "[1, 2"}, "config.yaml cannot be read"),
        ({"config": "a: 1"}, "config.yaml is not the configuration of a run"),
        ({"config": "!!python/object/apply:os.system [false]"}, "config.yaml cannot be read"),
        (
            {"config": "{}", "progress": {"metrics": 3, "step": "many", "max_steps": None}},
            "config.yaml is not",
        ),
        (
            {"progress": {"state": 7, "step": float("nan"), "steps_per_s": True, "why": [], "metrics": []}},
            None,
        ),
    ],
)
def test_broken_files_do_not_end_the_table(tmp_path, files, says):
    _run(tmp_path / "a", **files)
    _run(tmp_path / "b", PROGRESS | {"state": "finished"})
    text = table(rows_of([tmp_path]))
    assert says is None or f"\n    {says}" in text
    assert text.splitlines()[-1].startswith("b ") and all(len(line) <= 120 for line in text.splitlines())


def test_runs_are_found_below_but_not_within_runs(tmp_path):
    for name in ("one", "sweep/k8", "sweep/k16", "one/checkpoints/x", "caches/c", ".hidden/x", "a/b/c/d/e/f"):
        _run(tmp_path / name)
    (tmp_path / "sweep" / "again").symlink_to(tmp_path)  # a loop ends
    runs = find_runs([tmp_path, tmp_path / "one"])
    assert {str(run.relative_to(tmp_path)) for run in runs} >= {"one", "sweep/k8", "sweep/k16"}
    assert not any(part in str(run) for run in runs for part in ("checkpoints", "caches", "hidden", "/f"))
    names = [row.name for row in rows_of([tmp_path / "sweep" / "k8", tmp_path / "sweep" / "k16"])]
    assert sorted(names) == ["k16", "k8"]


def test_columns_line_up_and_long_names_keep_their_end(tmp_path):
    sweep = "a-very-long-name-of-a-sweep-over-all-that-one-could-ever-want-to-vary"
    names = [f"{sweep}/lr-{i}-{'x' * 40}-seed-{i}" for i in range(3)]
    for name in names:
        _run(tmp_path / name, PROGRESS | {"state": "failed", "step": 1_000_000, "why": "w " * 200})
    _run(tmp_path / "other", PROGRESS | {"state": "finished", "tokens_per_s": None})
    lines = table(rows_of([tmp_path])).splitlines()
    assert max(map(len, lines)) <= 120
    rows = [line for line in lines if not line.startswith("    ")]
    assert len(rows) == 5 and len({len(line) for line in rows}) == 1
    assert [line.split()[0][-7:] for line in rows[1:4]] == [f"-seed-{i}" for i in range(3)]
    assert "10 st/s" in rows[4]


def test_json_has_every_field(tmp_path):
    _run(tmp_path / "a", PROGRESS)
    (row,) = json.loads(as_json(rows_of([tmp_path])))
    assert row["state"] == "dead" and row["train"]["fvu"] == 0.25 and row["memory_bytes"] == 10**9


def test_no_runs_and_no_folder(tmp_path):
    assert table(rows_of([tmp_path])).startswith("no runs here")
    with pytest.raises(InputError, match="nowhere is not a folder; give one that holds runs"):
        rows_of([tmp_path / "nowhere"])


def _script(*arguments, **more):
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        **more,
    )


def test_the_command(tmp_path):
    _run(tmp_path / "a", PROGRESS)
    script = str(ROOT / "scripts" / "status.py")
    shown = _script(script, str(tmp_path))
    assert shown.returncode == 0 and " dead " in shown.stdout and shown.stderr == ""
    assert json.loads(_script(script, str(tmp_path), "--json").stdout)[0]["name"] == "a"
    missing = _script(script, str(tmp_path / "none"))
    assert (
        missing.returncode == 2 and missing.stderr.startswith("error: ") and "Traceback" not in missing.stderr
    )
    assert _script(script, str(tmp_path), "--watch", "0").returncode == 2


def test_watching_shows_the_table_again_until_stopped(tmp_path):
    _run(tmp_path / "a", PROGRESS)
    watching = subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "status.py"), str(tmp_path), "--watch", "0.05"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    begin = time.monotonic()
    titles = 0
    while titles < 3 and time.monotonic() - begin < 60:
        titles += watching.stdout.readline().startswith("run ")
    watching.send_signal(2)
    _, errors = watching.communicate(timeout=60)
    assert titles == 3 and watching.returncode == 0 and errors == ""


def test_it_needs_nothing_heavy():
    code = "import sys, sae.status; print([m for m in ('torch', 'lightning', 'numpy') if m in sys.modules])"
    assert _script("-c", code).stdout == "[]\n"
