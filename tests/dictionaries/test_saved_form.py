"""Folding: scale, mean, whitening and norms leave outputs and active sets as they are, for every kind."""

import pytest
import torch
from support.kinds import D, K, N, make, moments, rows
from support.laws import KINDS

import sae
from sae.errors import InputError

PENALISED = ("ReLU", "Gated", "JumpReLU")
CHOOSING = ("TopK", "BatchTopK", "MatryoshkaBatchTopK")
ENCODED = (*PENALISED, *CHOOSING)


def _fresh(dictionary):
    return type(dictionary)(**dictionary.config).double()


def _same(a, b, x):
    """Outputs to rounding, and the very same latents."""
    one, other = a(x), b(x)
    assert len(one.latents.indices) > 0
    assert torch.equal(one.latents.indices, other.latents.indices)
    assert torch.equal(one.latents.row_offsets, other.latents.row_offsets)
    torch.testing.assert_close(one.latents.values, other.latents.values, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(one.x_hat, other.x_hat, rtol=1e-9, atol=1e-9)


def _scaled_rows(tensors, factors):
    """The same dictionary with rows of W_dec as long as the factors, latents in units of them."""
    divided = {"W_enc": factors, "b_enc": factors, "b_mag": factors}
    scaled = {name: t / divided[name] if name in divided else t for name, t in tensors.items()}
    scaled["W_dec"] = tensors["W_dec"] * factors[:, None]
    if "threshold" in tensors:
        per_latent = tensors["threshold"].dim() == 1
        scaled["threshold"] = tensors["threshold"] / (factors if per_latent else factors.mean())
    return scaled


@pytest.mark.parametrize(
    ("kind", "whiten"), [*((kind, False) for kind in KINDS), *((kind, True) for kind in ENCODED)]
)
@torch.no_grad()
def test_scale_mean_and_whitening_fold_exactly(kind, whiten):
    dictionary, x = make(kind, whiten=whiten), rows(200, seed=5)
    loaded = _fresh(dictionary)
    loaded.load_saved_tensors(dictionary.saved_tensors())
    _same(dictionary, loaded, x)
    assert loaded.input_scale == 1 and loaded.input_mean.abs().max() == 0
    assert getattr(loaded, "whitening", None) is None


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_latents_are_those_of_the_scaled_rows_over_the_scale(kind):
    dictionary, x, scale = make(kind, scaled=False), rows(100) - rows(100).mean(0), 0.35
    before = dictionary.encode(scale * x)
    dictionary.input_scale.fill_(scale)
    after = dictionary.encode(x)
    torch.testing.assert_close(after, before / scale)
    reconstruction = dictionary.decode(after)
    dictionary.input_scale.fill_(1.0)
    torch.testing.assert_close(reconstruction, dictionary.decode(before) / scale)


@pytest.mark.parametrize("kind", PENALISED)
@pytest.mark.parametrize("whiten", [False, True])
@torch.no_grad()
def test_free_norms_are_folded_with_the_same_outputs_and_active_set(kind, whiten):
    dictionary, x = make(kind, whiten=whiten), rows(200, seed=5)
    factors = torch.rand(N).double() * 3 + 0.1
    taken = make(kind, whiten=whiten)
    for parameter in taken.parameters():
        parameter.zero_()
    taken.take(_scaled_rows(dictionary.saved_tensors(), factors))
    torch.testing.assert_close(taken.W_dec.norm(dim=1), torch.ones(N).double())
    _same(dictionary, taken, x)


@pytest.mark.parametrize("kind", CHOOSING)
@torch.no_grad()
def test_kinds_that_compare_latents_take_uniform_norms_only(kind):
    dictionary, taken = make(kind), make(kind)
    tensors = dictionary.saved_tensors()
    taken.take(_scaled_rows(tensors, torch.full((N,), 2.5).double()))
    _same(dictionary, taken, rows(200, seed=5))
    uneven = torch.ones(N).double()
    uneven[4] = 1.5
    with pytest.raises(InputError, match="must have rows of one norm, got 1 to 1.5"):
        taken.take(_scaled_rows(tensors, uneven))


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_take_goes_on_in_other_statistics(kind):
    dictionary, taken, x = make(kind), make(kind, scaled=False), rows(200, seed=5)
    of_others = moments(rows(300, seed=8) * 2 - 3)
    taken.set_input_statistics(of_others.mean, of_others.mean_squared_norm)
    taken.take(dictionary.saved_tensors())
    _same(dictionary, taken, x)


@pytest.mark.parametrize("kind", ENCODED)
def test_starts_with_unit_rows_of_both_signs_and_a_tied_encoder(kind):
    arguments = {"target_l0": 3.0} if kind in PENALISED else {"k": K}
    dictionary = type(make(kind))(32, 2048, **arguments)
    assert torch.equal(dictionary.W_enc, dictionary.W_dec.T)
    assert dictionary.W_enc.data_ptr() != dictionary.W_dec.data_ptr()
    torch.testing.assert_close(dictionary.W_dec.norm(dim=1), torch.ones(2048))
    assert dictionary.directions.mean(0).norm() < 0.08
    assert 0.45 < (dictionary.directions > 0).float().mean() < 0.55


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision_keeps_thresholds_through_saving(kind, dtype, tmp_path):
    dictionary = make(kind)
    exact = {name: getattr(dictionary, name).detach().clone() for name in dictionary.exact}
    dictionary.to(dtype)
    assert dictionary.W_dec.dtype == dtype
    sae.save(dictionary, tmp_path)
    loaded = sae.load(tmp_path)
    for name, value in exact.items():
        assert getattr(dictionary, name).dtype == dictionary.exact[name]
        assert getattr(loaded, name).dtype == dictionary.exact[name]
        torch.testing.assert_close(getattr(dictionary, name), value.to(dictionary.exact[name]))


def test_every_kind_is_known_by_its_name():
    assert set(KINDS) == {*ENCODED, "MatchingPursuit"} <= set(sae.dictionaries.Dictionary.kinds)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_have_width(kind):
    with pytest.raises(InputError, match=f"must have d_model={D} columns"):
        make(kind)(torch.zeros(2, D + 1).double())
