"""NMF against scikit-learn, on planted factors, and its promises."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment, nnls
from sklearn.decomposition import NMF as SkNMF
from torch import Tensor

from sae.baselines import NMF
from sae.dictionaries.base import Dictionary
from sae.errors import InputError
from sae.ops.moments import Moments, StreamingMoments


def _moments(x: Tensor) -> Moments:
    streaming = StreamingMoments()
    streaming.add(x)
    return streaming.moments()


def _mixture(n: int = 4000, d: int = 32, r: int = 24, noise: float = 0.05, seed: int = 0) -> Tensor:
    """Sparse non-negative mixtures of signed directions, noise, and a mean that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.rand(n, r, generator=generator) * (torch.rand(n, r, generator=generator) < 0.15)
    directions = torch.randn(r, d, generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    return codes @ directions + noise * torch.randn(n, d, generator=generator) + 0.5


def _halves(x: Tensor) -> Tensor:
    centred = x.double() - _moments(x).mean
    return torch.cat([centred.clamp(min=0), (-centred).clamp(min=0)], dim=1)


def _fitted(x: Tensor, n_latents: int, **options: float) -> NMF:
    return NMF(x.shape[1], n_latents, **options).fit(list(x.split(1000)), _moments(x))


@pytest.fixture(scope="module")
def mixture() -> Tensor:
    return _mixture()


@pytest.fixture(scope="module")
def nmf(mixture: Tensor) -> NMF:
    return _fitted(mixture, 24)


def test_nmf_error_is_that_of_scikit_learn(mixture: Tensor, nmf: NMF) -> None:
    rows = _halves(mixture).numpy()
    reference = SkNMF(24, solver="cd", init="nndsvda", tol=1e-5, max_iter=2000, random_state=0).fit(rows)
    expected = reference.reconstruction_err_**2 / (rows**2).sum()
    assert nmf.objective([mixture]) <= 1.02 * expected


def test_nmf_finds_planted_exact_factors() -> None:
    generator = torch.Generator().manual_seed(0)
    # Each component lives on two coordinates of its own, with opposite signs: the factors are unique.
    directions = torch.zeros(6, 12)
    for j in range(6):
        directions[j, 2 * j : 2 * j + 2] = torch.tensor([0.8, -0.6])
    codes = torch.rand(1000, 6, generator=generator) * (torch.rand(1000, 6, generator=generator) < 0.3)
    x = torch.cat([codes @ directions, -codes @ directions])  # mean zero: centring changes nothing
    x = x[torch.randperm(2000, generator=generator)]
    nmf = _fitted(x, 12)
    planted = torch.cat([directions, -directions])
    cosines = nmf.directions @ planted.T
    rows, columns = linear_sum_assignment(-cosines.numpy())
    assert cosines[rows, columns].min() > 0.999
    assert nmf.objective([x]) < 1e-5


def test_nmf_is_nonnegative_and_unit(mixture: Tensor, nmf: NMF) -> None:
    assert (nmf.components >= 0).all() and (nmf.encode(mixture) >= 0).all()
    torch.testing.assert_close(nmf.directions.norm(dim=1), torch.ones(24))


def test_nmf_code_is_the_nonnegative_least_squares_code(mixture: Tensor, nmf: NMF) -> None:
    components = nmf.components.double().numpy()
    positive, negative = components[:, :32], components[:, 32:]
    codes = np.stack([nnls(components.T, row)[0] for row in _halves(mixture)[:20].numpy()])
    expected = _moments(mixture).mean.numpy() + codes @ (positive - negative)
    np.testing.assert_allclose(nmf(mixture[:20]).x_hat.numpy(), expected, atol=1e-3)
    lengths = np.linalg.norm(positive - negative, axis=1)
    np.testing.assert_allclose(nmf.encode(mixture[:20]).numpy(), codes * lengths, atol=1e-3)


def test_nmf_encode_of_negative_rows_explains_them(mixture: Tensor, nmf: NMF) -> None:
    mean = nmf.mean
    below = mean - (mixture[:500] - mean).abs()  # every coordinate under the mean
    assert nmf.objective([below]) < 1
    assert nmf.encode(below).isfinite().all() and (nmf.encode(below) > 0).any()


def test_nmf_cancelling_component_has_no_latent() -> None:
    nmf = _fitted(_mixture(300, 4, 3), 3)
    nmf.components[1] = 0.5 / 2**0.5  # equal halves: zero in signed space
    x = _mixture(50, 4, 3)
    assert (nmf.encode(x)[:, 1] == 0).all() and nmf(x).x_hat.isfinite().all()
    torch.testing.assert_close(nmf.directions.norm(dim=1), torch.ones(3))


def test_nmf_sparse_code_refits_and_gets_better_with_k(mixture: Tensor, nmf: NMF) -> None:
    errors = []
    for k in (1, 2, 4, 8):
        code = nmf.sparse_code(mixture, k)
        left = mixture - nmf.decode_sparse(code)
        errors.append(left.square().sum().item())
        assert code.row_offsets.diff().max() <= k and (code.values > 0).all()
        # Least squares: what is left is orthogonal to the chosen directions.
        assert ((left @ nmf.directions.T)[code.rows, code.indices]).abs().max() < 1e-4
    assert errors == sorted(errors, reverse=True)
    assert nmf.sparse_code(mixture[:5], 99).n_rows == 5


def test_nmf_same_seed_same_components_other_seed_other_start() -> None:
    x = _mixture(500, 8, 6)
    assert torch.equal(_fitted(x, 6).components, _fitted(x, 6).components)
    assert not torch.equal(_fitted(x, 6, seed=1).components, _fitted(x, 6).components)


def test_nmf_does_not_depend_on_how_batches_are_cut(mixture: Tensor) -> None:
    x, moments = mixture[:1500], _moments(mixture[:1500])
    cuts = [[1500], [1, 700, 0, 799], [300] * 5]
    fits = [NMF(32, 8).fit(list(x.split(cut)), moments).components for cut in cuts]
    assert torch.equal(fits[0], fits[1]) and torch.equal(fits[0], fits[2])


def test_nmf_of_more_rows_in_the_moments_than_in_the_batches(mixture: Tensor) -> None:
    nmf = NMF(32, 24).fit([mixture[:2000]], _moments(mixture))
    assert nmf.objective([mixture[:2000]]) < 0.5


def test_nmf_float64_before_fit_stays_float64() -> None:
    x = _mixture(300, 6, 4)
    nmf = NMF(6, 4).double().fit([x], _moments(x))
    assert nmf.components.dtype == nmf.encode(x).dtype == nmf(x).x_hat.dtype == torch.float64


@pytest.mark.parametrize(("rows", "n_latents"), [(400, 40), (5, 8), (3, 2)])
def test_nmf_with_more_components_than_dimensions_or_rows(rows: int, n_latents: int) -> None:
    x = _mixture(rows, 6, 4)
    nmf = _fitted(x, n_latents)
    assert nmf.components.isfinite().all() and nmf.objective([x]) < 0.5


def test_nmf_saved_tensors_rebuild_it_and_the_rule_can_be_followed(mixture: Tensor, nmf: NMF) -> None:
    assert Dictionary.kinds["NMF"] is NMF
    tensors, x = nmf.saved_tensors(), mixture[:10]
    assert set(tensors) == {"W_dec", "b_dec", "components"}
    again, other = NMF(**nmf.config), NMF(**nmf.config)
    again.load_saved_tensors(tensors)
    other.load_state_dict(nmf.state_dict())
    assert torch.equal(again.encode(x), nmf.encode(x)) and torch.equal(other.encode(x), nmf.encode(x))
    torch.testing.assert_close(nmf.encode(x) @ tensors["W_dec"] + tensors["b_dec"], nmf(x).x_hat)


def test_nmf_takes_leading_axes_and_half_precision(mixture: Tensor, nmf: NMF) -> None:
    x = mixture[:12].reshape(3, 4, 32)
    torch.testing.assert_close(nmf.encode(x).reshape(12, 24), nmf.encode(mixture[:12]))
    half = [mixture.bfloat16()]
    assert NMF(32, 4).fit(half, _moments(half[0])).components.isfinite().all()


def test_nmf_stopped_by_passes_warns(mixture: Tensor) -> None:
    with pytest.warns(UserWarning, match="stopped after passes=2: the last one lowered .* raise `passes`"):
        _fitted(mixture, 4, passes=2)


def test_nmf_before_fit_raises() -> None:
    nmf, x = NMF(4, 2), torch.ones(2, 4)
    uses = (
        nmf.encode,
        nmf.forward,
        lambda rows: nmf.sparse_code(rows, 1),
        lambda rows: nmf.objective([rows]),
    )
    for use in uses:
        with pytest.raises(InputError, match="`NMF` must be fitted before use.*call fit"):
            use(x)
    with pytest.raises(InputError, match="`NMF` must be fitted before use"):
        nmf.saved_tensors()


def test_nmf_bad_input_raises(mixture: Tensor) -> None:
    moments = _moments(mixture)
    with pytest.raises(InputError, match="`passes` must be at least 1, got passes=0"):
        NMF(4, 2, passes=0)
    with pytest.raises(InputError, match="`tolerance` must be at least 0, got tolerance=-1"):
        NMF(4, 2, tolerance=-1.0)
    with pytest.raises(InputError, match="`batches` must be re-iterable, got an iterator"):
        NMF(32, 2).fit(iter([mixture]), moments)
    with pytest.raises(InputError, match="`batches` must give at least one row, got none"):
        NMF(32, 2).fit([], moments)
    with pytest.raises(InputError, match="`moments` must be of d_model=4 columns, got 32"):
        NMF(4, 2).fit([mixture], moments)


def test_nmf_code_with_all_atoms_is_the_least_squares_optimum():
    x = torch.randn(300, 6).double() * torch.arange(1.0, 7.0)
    streaming = StreamingMoments()
    streaming.add(x)
    nmf = NMF(6, 5).double().fit([x], streaming.moments())
    centred = (x - x.mean(0)).numpy()
    error = {k: ((nmf.decode_sparse(nmf.sparse_code(x, k)) - x) ** 2).sum().item() for k in (4, 5, 50)}
    best = sum(nnls(nmf.directions.T.numpy(), row)[1] ** 2 for row in centred)
    assert error[50] == error[5] == pytest.approx(best, rel=1e-3)
    assert error[5] <= error[4] * (1 + 1e-3)
