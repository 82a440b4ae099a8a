"""Baselines stand at the autoencoder's own L0, on the same rows, about the same mean."""

from pathlib import Path
from unittest.mock import Mock

import lightning
import pytest
import torch

from sae.activations import ActivationDataModule
from sae.activations.exchange.imported import import_rows
from sae.baselines import NMF
from sae.callbacks import DictionaryLearningBaseline, NaturalBaseline, NMFBaseline, PCABaseline
from sae.callbacks.baselines import Wanted, _score, fitted_baselines
from sae.dictionaries import ReLU, TopK
from sae.errors import InputError
from sae.training import SparseAutoencoderModule

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
    baseline, _ = callback._fit(data, Wanted(D, None), torch.device("cpu"))
    mean = data.moments.mean
    coefficients = (held_out - mean) @ baseline.directions.double().T
    kept = coefficients * torch.zeros_like(coefficients).scatter(1, coefficients.abs().topk(k).indices, 1.0)
    scores = _score(baseline, data, k)
    assert scores.l0 == k
    reference = _fvu(held_out, kept @ baseline.directions.double() + mean)
    assert scores.fvu == pytest.approx(reference, rel=1e-4, abs=1e-9)


def test_a_kept_fit_is_used_until_its_kind_fits_otherwise(data, monkeypatch):
    def fitted():
        return NMFBaseline()._fit(data, Wanted(D, D), torch.device("cpu"))

    _, seconds = fitted()
    assert fitted()[1] == round(seconds, 2)
    monkeypatch.setattr(NMF, "revision", NMF.revision + 1)
    (kept,) = (Path(data.cache.location) / "baselines").iterdir()
    fitted()
    assert len(list(kept.parent.iterdir())) == 2


def test_a_checkpoint_of_another_revision_is_fitted_anew(data, monkeypatch):
    old, new, same = (NMFBaseline(n_components=D, curve=[], keep=False) for _ in range(3))
    _begun(old, data, TopK(D, 16, 2))
    state = old.state_dict()
    same.load_state_dict(state)
    monkeypatch.setattr(NMF, "revision", NMF.revision + 1)
    new.load_state_dict(state)
    assert same.baseline_for(2).fitted and fitted_baselines({"callbacks": {"any": state}})["nmf"][None].fitted
    with pytest.raises(InputError, match="fitted when training starts"):
        new.baseline_for(2)


def test_a_checkpoint_with_the_tensors_of_another_revision_is_fitted_anew_or_said(data):
    old, new = NaturalBaseline(), NaturalBaseline()
    state = _begun(old, data, TopK(D, 16, 2)).state_dict()
    (fit,) = state["fits"].values()
    fit["state"]["kurtosis_rotated"] = fit["state"]["kurtosis_rotated"][0]
    fit["revision"] = 1
    new.load_state_dict(state)
    with pytest.raises(InputError, match="fitted when training starts"):
        new.baseline_for(2)
    with pytest.raises(InputError, match="NaturalBasis is of revision 1, this package's of 2"):
        fitted_baselines({"callbacks": {"any": state}})


def test_more_coefficients_never_hurt_a_baseline(data):
    for callback in (PCABaseline(), NMFBaseline()):
        baseline, _ = callback._fit(data, Wanted(D, D), torch.device("cpu"))
        fvu = [_score(baseline, data, k).fvu for k in (1, 2, 4, 8)]
        assert fvu == sorted(fvu, reverse=True) and fvu[0] < 1


def test_baseline_asked_for_before_training_is_an_error():
    with pytest.raises(InputError, match="pca baseline is fitted when training starts"):
        PCABaseline().baseline_for(4)


def _begun(callback, data, *dictionaries):
    module = Mock(spec=SparseAutoencoderModule, device=torch.device("cpu"))
    module.dictionaries = dict(enumerate(dictionaries))
    callback.on_fit_start(Mock(spec=lightning.Trainer, datamodule=data, is_global_zero=True), module)
    return callback


@pytest.mark.filterwarnings("ignore:.* stopped after passes")
def test_dictionary_learning_is_learned_for_each_l0_and_comes_back(data):
    described = {"n_components": 12, "max_rows": 800, "seeds": 2, "keep": False}
    of = [ReLU(D, 16, sparsity_coefficient=0.1), *(TopK(D, 16, k=k) for k in (4, 1, 4))]
    callback = _begun(DictionaryLearningBaseline(**described), data, *of)
    learned_for = {k: callback.baseline_for(k).k for k in (1, 2, 3, 4, 16)}
    assert learned_for == {1: 1, 2: 1, 3: 4, 4: 4, 16: 4}
    fvu = {k: [_score(callback.baseline_for(of), data, k).fvu for of in (1, 4)] for k in (1, 4)}
    assert fvu[1][0] < fvu[1][1] and fvu[4][1] < fvu[4][0]  # each is the better one where it belongs
    again = DictionaryLearningBaseline(**described)
    again.load_state_dict(callback.state_dict())
    for k in (1, 4):
        assert torch.equal(again.baseline_for(k).directions, callback.baseline_for(k).directions)
    other = DictionaryLearningBaseline(**(described | {"k": 2}))
    other.load_state_dict(callback.state_dict())  # described anew: nothing of the old one
    assert _begun(other, data, *of).baseline_for(4).k == 2


def test_dictionary_learning_needs_an_l0(data):
    with pytest.raises(InputError, match="`k` of ksvd must be given: ReLU has no L0"):
        _begun(DictionaryLearningBaseline(method="ksvd"), data, ReLU(D, 16, sparsity_coefficient=0.1))


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
