"""Lines of a sweep: words as in a shell, a folder for each."""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "slurm" / "sweep_line.py"
_spec = importlib.util.spec_from_file_location("sweep_line", SCRIPT)
sweep_line = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sweep_line)


@pytest.fixture
def sweep(tmp_path):
    def write(*lines):
        path = tmp_path / "ks.txt"
        path.write_text("\n".join(lines))
        return path

    return write


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("layer12.yaml --model.lr 1e-3", ["--config", "layer12.yaml", "--model.lr", "1e-3"]),
        ("--data.source.dataset 'my texts/*.jsonl'", ["--data.source.dataset", "my texts/*.jsonl"]),
        ("--a '[resid.2, resid.3]' --b=\"$HOME `id`\"", ["--a", "[resid.2, resid.3]", "--b=$HOME `id`"]),
        ("--data.source.dataset a#b", ["--data.source.dataset", "a#b"]),
    ],
)
def test_words_are_split_and_never_expanded(sweep, line, words):
    path = sweep("first", line)
    given = sweep_line.arguments(2, path, ["--config", "base.yaml"])
    assert given == ["--config", "base.yaml", *words, "--trainer.default_root_dir", "runs/ks/2"]


def test_a_line_may_name_its_own_folder(sweep):
    for line in ("--trainer.default_root_dir=x", "--trainer.default_root_dir x"):
        assert sweep_line.arguments(1, sweep(line), [])[-1].endswith("x")


@pytest.mark.parametrize("line", ["", "   ", "# --model.lr 1", "  # more"])
def test_empty_lines_and_comments_train_nothing(sweep, line):
    assert sweep_line.arguments(1, sweep(line, "--model.lr 1"), ["--config", "base.yaml"]) == []


@pytest.mark.parametrize(
    ("number", "says"),
    [
        ("3", "has 2 lines and no line 3; submit with --array=1-2"),
        ("0", "no line 0"),
        ("2", "line 2 of .* quotation"),
    ],
)
def test_bad_lines_are_one_error_and_status_2(sweep, number, says):
    path = sweep("--model.lr 1", "--model.lr 'unclosed")
    done = subprocess.run([sys.executable, SCRIPT, number, path], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and len(done.stderr.splitlines()) == 1
    assert re.search(says, done.stderr), done.stderr
