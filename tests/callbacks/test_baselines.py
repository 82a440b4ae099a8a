"""Baselines stand at the autoencoder's own L0, on the same rows, about the same mean."""

import pytest
import torch

from sae.activations import ActivationDataModule
from sae.activations.exchange.imported import import_rows
from sae.callbacks import NMFBaseline, PCABaseline
from sae.callbacks.baselines import _score
from sae.errors import InputError

D = 8


@pytest.fixture
def data(tmp_path):
    mixing = torch.diag(torch.arange(1.0, D + 1))
    import_rows(torch.randn(3000, D) @ mixing + 4.0, tmp_path / "cache", held_out=0.2)
    module = ActivationDataModule(str(tmp_path / "cache"), batch_size=256)
    module.setup()
    return module


@pytest.fixture
def held_out(data):
    return torch.cat([batch.x for batch in data.val_dataloader()]).double()


def _fvu(x, x_hat):
    return ((x - x_hat).square().sum() / (x - x.mean(0)).square().sum()).item()


@pytest.mark.parametrize("k", [1, 3, D])
def test_pca_keeps_the_k_largest_coefficients_of_each_row(data, held_out, k):
    callback = PCABaseline()
    baseline, _ = callback._fit(data, None, torch.device("cpu"))
    mean = data.moments.mean
    coefficients = (held_out - mean) @ baseline.directions.double().T
    kept = coefficients * torch.zeros_like(coefficients).scatter(1, coefficients.abs().topk(k).indices, 1.0)
    scores = _score(baseline, data, k)
    assert scores.l0 == k
    reference = _fvu(held_out, kept @ baseline.directions.double() + mean)
    assert scores.fvu == pytest.approx(reference, rel=1e-4, abs=1e-9)


def test_more_coefficients_never_hurt_a_baseline(data):
    for callback in (PCABaseline(), NMFBaseline()):
        baseline, _ = callback._fit(data, D, torch.device("cpu"))
        fvu = [_score(baseline, data, k).fvu for k in (1, 2, 4, 8)]
        assert fvu == sorted(fvu, reverse=True) and fvu[0] < 1


def test_baseline_asked_for_before_training_is_an_error():
    with pytest.raises(InputError, match="pca baseline is fitted when training starts"):
        _ = PCABaseline().baseline


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"max_rows": 0}, "`max_rows` must be at least 1, got max_rows=0"),
        ({"n_components": 0}, "`n_components` must be at least 1"),
        ({"curve": [4, 0]}, "`curve` must hold numbers of components"),
    ],
)
def test_numbers_out_of_range_are_errors(arguments, match):
    with pytest.raises(InputError, match=match):
        NMFBaseline(**arguments)
