"""Semi-NMF on planted factors, and its promises."""

import warnings
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.optimize import linear_sum_assignment, nnls
from support.ranks import run_ranks

from sae.baselines import SemiNMF
from sae.baselines.semi_nmf import SOLVERS, _LeastSquares, nearest_components, spread_rows
from sae.dictionaries import load_dictionary, save_dictionary
from sae.errors import InputError
from sae.ops.group import ALONE, Group
from sae.ops.moments import StreamingMoments


def _moments(x):
    streaming = StreamingMoments()
    streaming.add(x)
    return streaming.moments()


def _mixture(n=500, d=10, r=6, noise=0.1):
    generator = torch.Generator().manual_seed(0)
    codes = torch.rand(n, r, generator=generator) * (torch.rand(n, r, generator=generator) < 0.25)
    x = codes @ torch.randn(r, d, generator=generator)
    return x + noise * torch.randn(n, d, generator=generator) + 0.5


def _quick(x, n_latents, passes=8, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return SemiNMF(x.shape[1], n_latents, passes, **options).fit([x], _moments(x))


@pytest.fixture(scope="module")
def mixture():
    return _mixture()


@pytest.fixture(scope="module")
def semi(mixture):
    return _quick(mixture, 5)


@pytest.mark.parametrize("solver", SOLVERS)
def test_semi_nmf_finds_planted_directions_of_both_signs(solver):
    generator = torch.Generator().manual_seed(0)
    planted = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q[:4]
    planted = torch.cat([planted, -planted])  # codes of mean zero need no offset
    which = torch.arange(400) % 8
    x = planted[which] * (0.5 + torch.rand(200, 1, generator=generator)).repeat_interleave(2, 0)[:400]
    x = torch.cat([x, -x])
    semi = SemiNMF(8, 8, solver=solver).fit([x], _moments(x))
    cosines = semi.directions @ planted.T
    rows, columns = linear_sum_assignment(-cosines.numpy())
    assert cosines[rows, columns].min() > 0.999
    assert semi.objective([x]) < 1e-5
    code = semi.sparse_code(x, 1)
    torch.testing.assert_close(semi.decode_sparse(code), x, rtol=1e-3, atol=1e-3)


def test_semi_nmf_code_is_the_nonnegative_least_squares_code(mixture, semi):
    directions = semi.directions.double().numpy()
    centred = (mixture[:30].double() - _moments(mixture).mean).numpy()
    expected = np.stack([nnls(directions.T, row)[0] for row in centred])
    np.testing.assert_allclose(semi.encode(mixture[:30]).numpy(), expected, atol=1e-4)
    torch.testing.assert_close(semi.directions.norm(dim=1), torch.ones(5))
    assert (semi.directions < 0).any()


def test_semi_nmf_online_ends_where_the_sweeps_do(mixture):
    rows = mixture.repeat(8, 1)  # many mini-batches
    online, sweeps = (SemiNMF(10, 5, solver=solver, seed=1).fit([rows], _moments(rows)) for solver in SOLVERS)
    assert online.objective([rows]) < 1.05 * sweeps.objective([rows])


@pytest.mark.parametrize("n_latents", [1, 5, 10])
def test_semi_nmf_sweeps_never_raise_the_objective(mixture, n_latents):
    x = mixture[:200] - mixture[:200].mean(0)
    learner = _LeastSquares(spread_rows(x, n_latents, torch.Generator().manual_seed(0)), ALONE)
    seen = [learner.learn(iter(x.split(80)), len(x)) for _ in range(5)]
    assert all(later <= earlier * (1 + 1e-7) for earlier, later in pairwise(seen))
    assert seen[-1] < seen[0]


def test_semi_nmf_is_never_better_than_as_many_principal_components(mixture, semi):
    # n directions with codes >= 0 lie in n dimensions: never better than n principal components.
    variances = torch.linalg.eigvalsh(_moments(mixture).covariance)
    assert variances[:-5].sum() / variances.sum() <= semi.objective([mixture]) < 0.2


def test_semi_nmf_with_more_latents_than_dimensions_leaves_nothing(mixture):
    semi = SemiNMF(10, 15).fit([mixture[:100]], _moments(mixture[:100]))
    assert semi.objective([mixture[:100]]) < 1e-6
    errors = [(semi.decode_sparse(semi.sparse_code(mixture, k)) - mixture).square().sum() for k in (1, 2, 4)]
    assert errors == sorted(errors, reverse=True)


def test_semi_nmf_with_more_latents_than_rows_is_finite():
    x = _mixture(3)
    semi = SemiNMF(10, 6).fit([x], _moments(x))
    assert semi.components.isfinite().all() and semi.objective([x]) < 1e-6


def test_semi_nmf_unused_direction_keeps_its_values():
    codes = torch.tensor([[2.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    rows = torch.tensor([[4.0, 2.0], [0.0, 0.0]], dtype=torch.float64)
    updated = nearest_components(
        codes, rows, torch.tensor([[1.0, 0.0], [0.6, 0.8]], dtype=torch.float64), ridge=1e-13
    )
    torch.testing.assert_close(updated, torch.tensor([[2.0, 1.0], [0.6, 0.8]], dtype=torch.float64))


def test_semi_nmf_of_sums_that_overflowed_is_an_error():
    sums = torch.full((2, 2), torch.inf, dtype=torch.float64)
    with pytest.raises(InputError, match="small enough to be squared in float32"):
        nearest_components(sums, sums, torch.eye(2, dtype=torch.float64), ridge=1e-5)


def test_spread_rows_takes_each_direction_once():
    directions = torch.eye(4)
    rows = torch.cat([directions, 3 * directions, torch.zeros(5, 4)])
    drawn = spread_rows(rows, 6, torch.Generator().manual_seed(1))
    assert sorted(drawn[:4].argmax(1).tolist()) == [0, 1, 2, 3]
    torch.testing.assert_close(drawn.norm(dim=1), torch.ones(6))


def test_semi_nmf_same_seed_same_directions_however_batches_are_cut(mixture):
    first, moments = _quick(mixture, 4, 2), _moments(mixture)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        second = SemiNMF(10, 4, 2).fit(list(mixture.split([3, 0, 400, 97])), moments)
    assert torch.equal(first.components, second.components)
    assert not torch.equal(_quick(mixture, 4, 2, seed=1).components, first.components)


def test_semi_nmf_ends_the_same_on_several_ranks():
    assert run_ranks(2, _on_ranks) == [None, None]


def _on_ranks():
    torch.distributed.init_process_group("gloo")
    x = _mixture(101)
    warnings.simplefilter("ignore")
    shared = SemiNMF(10, 4, 3).fit([x], _moments(x), Group.of_training(torch.device("cpu")))
    torch.testing.assert_close(shared.components, _quick(x, 4, 3).components)


def test_semi_nmf_saved_form_rebuilds_it(mixture, semi, tmp_path):
    save_dictionary(semi, tmp_path)
    again = load_dictionary(tmp_path)
    assert again.config == semi.config and torch.equal(again.encode(mixture), semi.encode(mixture))
    assert set(semi.saved_tensors()) == {"W_dec", "b_dec"}
    assert semi.encode(mixture[:0]).shape == (0, 5)


def test_semi_nmf_bad_input_raises(mixture):
    with pytest.raises(InputError, match="`passes` must be at least 1, got passes=0"):
        SemiNMF(4, 2, passes=0)
    with pytest.raises(InputError, match="`solver` must be one of online, sweeps, got solver='hals'"):
        SemiNMF(4, 2, solver="hals")
    with pytest.raises(InputError, match="`batches` must be re-iterable"):
        SemiNMF(10, 2).fit(iter([mixture]), _moments(mixture))
    with pytest.raises(InputError, match="`batches` must give at least one row"):
        SemiNMF(10, 2).fit([], _moments(mixture))
    with pytest.raises(InputError, match="`SemiNMF` must be fitted before use"):
        SemiNMF(10, 2).encode(mixture)
    with pytest.warns(UserWarning, match="SemiNMF stopped after passes=1: the last one lowered"):
        SemiNMF(10, 2, passes=1).fit([mixture], _moments(mixture))
