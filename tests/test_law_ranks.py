"""The law of ranks: R of them that share a batch leave what one leaves that has all of it."""

import json
import os

import pytest
import torch
from support.laws import EVERY_KIND, QUICK, VARIANTS, differing, left_by, some_die, write_run
from support.ranks import run_ranks

from sae.activations.exchange.imported import import_rows
from sae.dictionaries import Dictionary
from sae.training.learner import Learner
from train import main

pytestmark = pytest.mark.shapes_unchecked


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


@pytest.mark.parametrize("kind", EVERY_KIND)
@pytest.mark.parametrize(
    ("precision", "tolerance"), [pytest.param("64-true", 4e-6, marks=pytest.mark.slow), ("32-true", 2e-6)]
)
def test_two_ranks_leave_what_one_leaves(cache, tmp_path, kind, precision, tolerance):
    """Weights, Adam's moments, counters, metrics, baselines, and every point of every curve, once.

    In float64 only the baselines, which are float32, come near the bound. In float32 latents that begin anew
    along a residual of late carry its rounding with them.
    """
    anew = precision == "32-true" and "resample" in Dictionary.kinds[kind].default_revival
    asked = {"precision": precision, "baselines": kind in QUICK}
    one = _left_by_ranks(1, tmp_path / "one", cache, kind, **asked)
    two = _left_by_ranks(2, tmp_path / "two", cache, kind, **asked)
    assert some_die(one)
    assert (
        differing(_without_generators(one), _without_generators(two), 10 * tolerance if anew else tolerance)
        == []
    )
    of_training = [{n: v for n, v in left.items() if "checkpoint.state_dict" in n} for left in (one, two)]
    assert (
        differing(*of_training, tolerance=1e-12 if precision == "64-true" else 1e-5 if anew else 1e-6) == []
    )


def _train_and_tell(run, told):
    """A run that leaves this rank's weights in a file."""
    real = Learner.settle

    def settle(self, step, *arguments):
        real(self, step, *arguments)
        torch.save(self.dictionary.W_dec.detach(), f"{told}-{os.environ['RANK']}.pt")

    Learner.settle = settle  # in a fork
    main(["--config", run])


def test_ranks_that_join_at_a_resume_begin_the_same_latents_anew(cache, tmp_path):
    model = {"revival": ["resample"], "resample_every": 5}
    for world, steps in ((1, 20), (2, 50)):
        run = write_run(tmp_path, cache, model=model, baselines=False, devices=world, max_steps=steps)
        outcomes = run_ranks(world, _train_and_tell, run, tmp_path / f"{world}")
        assert outcomes == [None] * world, "\n".join(map(str, outcomes))
    first, second = (torch.load(tmp_path / f"2-{rank}.pt") for rank in (0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, torch.load(tmp_path / "1-0.pt"))


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_two_ranks_leave_what_one_leaves_however_it_trains(cache, tmp_path, variant):
    kind, model = VARIANTS[variant]
    one, two = (
        _left_by_ranks(
            world, tmp_path / str(world), cache, kind, model=model, baselines=False, precision="64-true"
        )
        for world in (1, 2)
    )
    assert differing(_without_generators(one), _without_generators(two), 1e-6) == []
    of_training = [{n: v for n, v in left.items() if "checkpoint.state_dict" in n} for left in (one, two)]
    assert differing(*of_training, tolerance=1e-11) == []


def _count_collectives(run, counts):
    """Trains, and writes which collectives each step from 10 to 14 made."""
    from torch.profiler import ProfilerActivity, profile

    from sae.training import SparseAutoencoderModule

    found, state = {}, {}

    def begin(self, batch, batch_idx):
        if 10 <= self.global_step < 15:
            state["profiler"] = profile(activities=[ProfilerActivity.CPU])
            state["profiler"].__enter__()

    def end(self, outputs, batch, batch_idx):
        if profiler := state.pop("profiler", None):
            profiler.__exit__(None, None, None)
            names = [event.name for event in profiler.events() if event.name.startswith("gloo:")]
            found[self.global_step] = names

    SparseAutoencoderModule.on_train_batch_start = begin
    SparseAutoencoderModule.on_train_batch_end = end
    main(["--config", run])
    if torch.distributed.get_rank() == 0:
        counts.write_text(json.dumps(found))


@pytest.mark.filterwarnings("ignore")
def test_a_quiet_step_has_no_collective_but_that_of_its_gradients(cache, tmp_path):
    counts = tmp_path / "counts.json"
    run = write_run(tmp_path, cache, devices=2, log_every_n_steps=14, val_check_interval=100)
    outcomes = run_ranks(2, _count_collectives, run, counts)
    assert outcomes == [None] * 2, "\n".join(map(str, outcomes))
    found = json.loads(counts.read_text())
    buckets = found["11"]
    assert (
        buckets and all("all_reduce" in name for name in buckets) and len(buckets) <= 2
    )  # one bucket is enough here
    assert all(found[step] == buckets for step in ("12", "13"))
    assert len(found["14"]) > len(buckets)  # a step that logs
