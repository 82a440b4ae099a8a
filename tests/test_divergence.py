"""Training that diverges: the kinds that keep more than weights keep that too."""

import pytest
import torch
from support.laws import write_run

import sae
from sae.activations.exchange.imported import import_rows
from sae.checkpoints import is_whole
from sae.exits import exit_on_input_error
from sae.training import SparseAutoencoderModule
from train import main

pytestmark = pytest.mark.shapes_unchecked


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    torch.manual_seed(0)
    rows = torch.randn(3000, 16) @ torch.randn(16, 16)
    return import_rows(rows, tmp_path_factory.mktemp("law") / "cache", held_out=0.1).location


@pytest.mark.parametrize("kind", ["JumpReLU", "BatchTopK"])
def test_a_threshold_that_is_not_finite_ends_the_run(cache, tmp_path, capsys, monkeypatch, kind):
    """Nothing fires above it, and so the loss stays finite."""
    real = SparseAutoencoderModule.training_step

    def breaks(self, batch, batch_idx):
        if self.global_step == 20:
            self.dictionary.threshold.data.view(-1)[0] = float("nan")
        return real(self, batch, batch_idx)

    monkeypatch.setattr(SparseAutoencoderModule, "training_step", breaks)
    run = write_run(tmp_path, cache, kind, baselines=False)
    with pytest.raises(SystemExit) as ended:
        exit_on_input_error(lambda: main(["--config", run]))
    assert ended.value.code == 1
    told = capsys.readouterr().err
    assert "a threshold is not finite at step 21 (batch 20 " in told
    assert "the weights of the step before are not finite either" in told
    assert not (tmp_path / "run" / "before_divergence").exists()
    last = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 20
    assert last["state_dict"]["learners.dictionary.dictionary.threshold"].isfinite().all()


@pytest.mark.parametrize(
    "kind",
    ["BatchTopK", "JumpReLU", *(pytest.param(k, marks=pytest.mark.slow) for k in ("ReLU",))],
)
def test_a_loss_that_is_not_finite_leaves_finite_thresholds_and_status_1(cache, tmp_path, capsys, kind):
    run = write_run(tmp_path, cache, kind, baselines=False, gradient_clip_val=0.0)
    with pytest.raises(SystemExit) as ended:
        exit_on_input_error(lambda: main(["--config", run, "--model.lr=1e15", "--checkpoint_every=1"]))
    assert ended.value.code == 1
    told = capsys.readouterr().err
    assert "is not finite at step" in told and "(batch " in told and "lower `model.lr`" in told
    kept = sae.load(tmp_path / "run" / "before_divergence")
    broken = [name for name, tensor in kept.saved_tensors().items() if not tensor.isfinite().all()]
    assert broken == []
    assert is_whole(tmp_path / "run" / "checkpoints" / "last.ckpt")
