"""The law of ranks: R of them that share a batch leave what one leaves that has all of it."""

import pytest
import torch
from support.laws import KINDS, differing, left_by, write_run
from support.ranks import run_ranks

from sae.activations.exchange.imported import import_rows
from train import main


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    torch.manual_seed(0)
    rows = torch.randn(3000, 16) @ torch.randn(16, 16)
    return import_rows(rows, tmp_path_factory.mktemp("law") / "cache", held_out=0.1).location


def _left_by_ranks(world, folder, cache, kind, **trainer):
    run = write_run(folder, cache, kind, devices=world, **trainer)
    outcomes = run_ranks(world, main, ["--config", run])
    assert outcomes == [None] * world, "\n".join(map(str, outcomes))
    return left_by(folder / "run")


def _without_generators(left):
    return {name: value for name, value in left.items() if ".generators." not in name}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("precision", "tolerance"), [("64-true", 1e-6), ("32-true", 2e-6)])
def test_two_ranks_leave_what_one_leaves(cache, tmp_path, kind, precision, tolerance):
    """Weights, Adam's moments, counters, metrics, baselines, and every point of every curve, once.

    In float64 only the baselines, which are float32, come near the bound.
    """
    one = _left_by_ranks(1, tmp_path / "one", cache, kind, precision=precision)
    two = _left_by_ranks(2, tmp_path / "two", cache, kind, precision=precision)
    assert "train/auxk" in str(one.keys())
    assert differing(_without_generators(one), _without_generators(two), tolerance) == []
    of_training = [{n: v for n, v in left.items() if "checkpoint.state_dict" in n} for left in (one, two)]
    assert differing(*of_training, tolerance=1e-12 if precision == "64-true" else 1e-6) == []
