"""Refined codes: the contract for every method, and never worse than the encoder they replace."""

from __future__ import annotations

import pytest
import torch
from support.planted import planted_codes, unit_atoms

import sae
from sae.dictionaries.refined import METHODS
from sae.errors import InputError

D, N, K = 24, 48, 3


def _world(scale=20.0):
    """An encoder that is the true directions' transpose, and rows made of K of them plus a mean."""
    atoms = unit_atoms(N, D, torch.float32)
    mean = torch.linspace(-3, 3, D)
    rows = planted_codes(600, N, K).float() * scale @ atoms + mean
    dictionary = sae.TopK(D, N, K)
    dictionary.load_saved_tensors({"W_enc": atoms.T, "b_enc": -(atoms @ mean), "W_dec": atoms, "b_dec": mean})
    return dictionary.requires_grad_(False), rows


def _refined(method, dictionary, rows):
    refined = sae.Refined.of(dictionary, method)
    if method == "fista":
        refined.set_penalty(rows)
    return refined


def _fvu(x, x_hat):
    return float((x - x_hat).square().sum() / (x - x.mean(0)).square().sum())


@pytest.mark.parametrize("method", METHODS)
def test_refined_codes_are_no_worse_at_equal_l0(method) -> None:
    dictionary, rows = _world()
    own = dictionary(rows)
    refined = _refined(method, dictionary, rows)(rows)
    assert len(refined.latents.values) <= 1.01 * len(own.latents.values)
    assert (refined.latents.values > 0).all()
    assert _fvu(rows, refined.x_hat) < _fvu(rows, own.x_hat)


def test_omp_of_true_directions_finds_nearly_all_codes() -> None:
    dictionary, rows = _world()
    found = sae.Refined.of(dictionary).encode(rows)
    exact = (found - 20 * planted_codes(600, N, K).float()).abs().amax(1) < 1e-2
    own = (dictionary.encode(rows) - 20 * planted_codes(600, N, K).float()).abs().amax(1) < 1e-2
    assert exact.float().mean() > 0.7 > 0.1 > own.float().mean()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_keeps_the_contract(method, tmp_path) -> None:
    dictionary, rows = _world()
    refined = _refined(method, dictionary, rows)
    assert set(refined.saved_tensors()) == {"W_dec", "b_dec"}
    assert type(refined)(**refined.config).config == refined.config
    x = rows[:6].reshape(2, 3, D)
    latents = refined.encode(x)
    assert latents.shape == (2, 3, N) and refined(x).x_hat.shape == x.shape
    torch.testing.assert_close(refined.encode_sparse(x).to_dense(N), latents.reshape(6, N))
    torch.testing.assert_close(refined.decode(latents), refined(x).x_hat, rtol=1e-4, atol=1e-4)
    sae.save(refined, tmp_path)
    loaded = sae.load(tmp_path)
    assert loaded.config == refined.config and loaded.inference == refined.inference
    torch.testing.assert_close(loaded.encode(x), latents)


@pytest.mark.parametrize("method", ["omp", "matching_pursuit", "gradient_pursuit"])
def test_no_row_has_more_than_k_latents(method) -> None:
    dictionary, rows = _world()
    counts = sae.Refined.of(dictionary, method, k=2).encode_sparse(rows).row_offsets.diff()
    assert counts.max() == 2


def test_directions_and_bias_are_copies_in_raw_units() -> None:
    dictionary = sae.TopK(D, N, K)
    dictionary.set_input_statistics(torch.full((D,), 4.0), 5000.0)
    with torch.no_grad():
        dictionary.b_dec.normal_()
    refined = sae.Refined.of(dictionary)
    torch.testing.assert_close(refined.decode(torch.zeros(N)), dictionary.decode(torch.zeros(N)).detach())
    with torch.no_grad():
        dictionary.W_dec.zero_()
    assert refined.directions.norm(dim=1).min() > 0.99
    assert refined.k == K and not list(refined.parameters())


def test_dtype_follows_the_dictionary() -> None:
    dictionary, rows = _world()
    assert sae.Refined.of(dictionary.double()).encode(rows.double()).dtype == torch.float64


def test_a_dictionary_without_k_needs_one() -> None:
    pca = sae.PCA(D)
    pca.load_saved_tensors({"W_dec": torch.eye(D), "b_dec": torch.ones(D), "variances": torch.ones(D)})
    with pytest.raises(InputError, match="`k` must be given for a PCA"):
        sae.Refined.of(pca)
    assert sae.Refined.of(pca, k=2).encode(torch.arange(D) + 1.0).nonzero().flatten().tolist() == [
        D - 2,
        D - 1,
    ]


def test_arguments_that_do_not_fit_raise() -> None:
    with pytest.raises(InputError, match=r"`k` must be in \[1, n_latents=48\], got k=49"):
        sae.Refined(D, N, 49)
    with pytest.raises(InputError, match="`method` must be one of .*fista, got method='lca'"):
        sae.Refined(D, N, K, "lca")
    with pytest.raises(InputError, match="`penalty` must be above 0 and finite, and with method='fista'"):
        sae.Refined(D, N, K, "omp", 0.5)
    with pytest.raises(InputError, match="`penalty` must be set before fista can code"):
        sae.Refined(D, N, K, "fista").encode(torch.zeros(2, D))
    with pytest.raises(InputError, match="`method` must be 'fista' to have a penalty"):
        sae.Refined(D, N, K).set_penalty(torch.ones(2, D))
