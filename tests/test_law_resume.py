"""The law of resuming: interrupted at any step and run again, a run leaves what an unbroken one leaves."""

import pytest
import torch
from support.laws import EVERY_KIND, QUICK, VARIANTS, differing, left_by, some_die, write_run

from sae.activations.exchange.imported import import_rows
from sae.training import SparseAutoencoderModule
from train import main

pytestmark = pytest.mark.shapes_unchecked


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    torch.manual_seed(0)
    rows = torch.randn(3000, 16) @ torch.randn(16, 16)
    return import_rows(rows, tmp_path_factory.mktemp("law") / "cache", held_out=0.1).location


class PowerCut(BaseException):
    """Nobody catches it."""


def _cut_at(monkeypatch, step, run):
    real = SparseAutoencoderModule.training_step

    def dies(self, batch, batch_idx):
        if self.global_step == step:
            raise PowerCut
        return real(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(SparseAutoencoderModule, "training_step", dies)
        with pytest.raises(PowerCut):
            main(["--config", run])


@pytest.mark.parametrize("kind", EVERY_KIND)
@pytest.mark.parametrize("batches", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_interrupted_and_run_again_leaves_the_same(cache, tmp_path, monkeypatch, kind, batches):
    """Cuts before the first checkpoint, at one, at a validation, across passes, and several in one run.

    Of one kind each in runs of its own (slow), of the others all in one. Baselines, which know nothing of
    kinds, stand beside one of them.
    """
    asked = {"accumulate_grad_batches": batches, "baselines": kind in QUICK}
    main(["--config", write_run(tmp_path / "unbroken", cache, kind, **asked)])
    unbroken = left_by(tmp_path / "unbroken" / "run")
    assert some_die(unbroken)  # else the law would say less than it seems to
    apart = kind in QUICK and batches > 1
    for cuts in [(4,), (7,), (10, 11), (23, 26, 49)] if apart else [(4, 7, 10, 11, 26, 49)]:
        run = write_run(tmp_path / f"cut{cuts}", cache, kind, **asked)
        for step in cuts:
            _cut_at(monkeypatch, step, run)
        main(["--config", run])
        assert differing(unbroken, left_by(tmp_path / f"cut{cuts}" / "run")) == [], cuts


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_interrupted_and_run_again_leaves_the_same_however_it_trains(cache, tmp_path, monkeypatch, variant):
    kind, model = VARIANTS[variant]
    main(["--config", write_run(tmp_path / "unbroken", cache, kind, model=model, baselines=False)])
    unbroken = left_by(tmp_path / "unbroken" / "run")
    run = write_run(tmp_path / "cut", cache, kind, model=model, baselines=False)
    for step in (10, 25, 33):
        _cut_at(monkeypatch, step, run)
    main(["--config", run])
    assert differing(unbroken, left_by(tmp_path / "cut" / "run")) == []


@pytest.mark.slow
def test_random_numbers_continue_where_they_were(cache, tmp_path, monkeypatch):
    """Of a kind that draws some in each step; none of ours does yet."""
    real = SparseAutoencoderModule.training_step

    def noisy(self, batch, batch_idx):
        return real(self, batch._replace(x=batch.x + 0.1 * torch.randn_like(batch.x)), batch_idx)

    monkeypatch.setattr(SparseAutoencoderModule, "training_step", noisy)
    main(["--config", write_run(tmp_path / "unbroken", cache, baselines=False)])
    run = write_run(tmp_path / "cut", cache, baselines=False)
    _cut_at(monkeypatch, 17, run)
    torch.randn(5)
    main(["--config", run])
    assert differing(left_by(tmp_path / "unbroken" / "run"), left_by(tmp_path / "cut" / "run")) == []
