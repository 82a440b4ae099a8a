"""scripts/benchmark.py, on sizes that take no time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from sae.benchmarks import fits

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "benchmark.py"


def _run(*arguments, **environment):
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment or None)


@pytest.mark.slow
def test_one_small_case_in_full(tmp_path):
    parts = ["steps", "kinds", "growth", "baselines", "training"]
    done = _run(
        "--case", "16,128,4,64", "--only", *parts, "--rounds", "1", "--no-compile",
        "--json", str(tmp_path / "found.json"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    (steps,) = found["steps"]
    assert {"ours", "floor", "dense"} <= steps["contenders"].keys()
    assert all(rate["tokens per s"] > 0 for rate in steps["contenders"].values())
    assert steps["contenders"]["ours"]["time over ours"]["median"] == 1
    assert sum(steps["stages"].values()) == pytest.approx(1)
    assert {"TopK", "BatchTopK", "JumpReLU", "Gated", "ReLU"} <= found["kinds"].keys()
    assert set(found["growth"]) == {"n_latents", "k", "d_model"}
    for name in ("tokens/s", "PCA statistics", "NMF codes", "training from a cache"):
        assert name in done.stdout


@pytest.mark.slow
def test_nmf_ends_where_scikit_learn_does(tmp_path):
    done = _run(
        "--only", "nmf", "--nmf-rows", "3000", "--nmf-worlds", "2", "--json", str(tmp_path / "found.json")
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())["nmf"]
    of = {word: [figure for name, figure in found.items() if word in name] for word in ("time", "objective")}
    assert len(of["time"]) == len(of["objective"]) == 2 and min(of["time"]) > 0, done.stdout
    assert max(of["objective"]) < 1.02, done.stdout


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.* stopped after passes", "ignore::sklearn.exceptions.ConvergenceWarning")
def test_no_fit_leaves_more_than_scikit_learns_in_mini_batches():
    figures = fits.fit_figures(1024)
    left = {name: figure for name, figure in figures.items() if "left" in name}
    assert len(figures) == 10 and len(left) == 5 and min(figures.values()) > 0
    assert max(left.values()) < 1.02, figures


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "environment", "said"),
    [
        (["--device", "cuda"], {"CUDA_VISIBLE_DEVICES": ""}, "torch sees no GPU here"),
        (["--case", "1,2"], {}, "must be d_model,n_latents,k,rows"),
        (["--only", "nmf", "--nmf-worlds", "0"], {}, "`--nmf-worlds` must be at least 1, got 0"),
        (["--only", "fits", "--fit-rows", "10"], {}, "`--fit-rows` must be at least 1024, got 10"),
        (["--only", "steps"], {"CXX": "no-such-compiler"}, "the compiler that CXX names, no-such-compiler"),
        (["--only", "steps"], {"PATH": ""}, r"a C++ compiler such as g++, and there is none; install it, or"),
    ],
)
def test_bad_input_is_said_in_a_line(arguments, environment, said):
    done = _run(*arguments, **{"PATH": "/usr/bin:/bin", **environment})
    assert done.returncode == 2 and said in done.stderr, done.stderr
    assert "Traceback" not in done.stderr
