"""ICA against scikit-learn and planted sources, its order and signs, and its promises."""

from __future__ import annotations

import warnings

import pytest
import torch
from sklearn.decomposition import FastICA
from torch import Tensor
from torch.nn import functional as F

from sae.baselines import ICA
from sae.errors import InputError
from sae.ops.moments import Moments, StreamingMoments
from sae.ops.truth import match


def _moments(x: Tensor) -> Moments:
    streaming = StreamingMoments()
    streaming.add(x)
    return streaming.moments()


def _skewed(n: int, d: int, seed: int = 0) -> Tensor:
    """Heavy-tailed independent sources of unit variance; the first is the farthest from a Gaussian."""
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(n, d, generator=generator, dtype=torch.float64)
    laplace = -(uniform - 0.5).sign() * torch.log1p(-2 * (uniform - 0.5).abs())
    sources = laplace.sign() * laplace.abs() ** torch.linspace(2.0, 1.2, d)
    sources = torch.where(sources > 0, 1.3 * sources, sources)
    return (sources - sources.mean(0)) / sources.std(0)


def _mixing(d: int, seed: int = 1) -> Tensor:
    """Unit rows that are not orthogonal: mixing and unmixing rows differ."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(d, d, generator=generator) + 2 * torch.eye(d) + 0.8
    return F.normalize(rows, dim=1).double()


D = 8
MIXING = _mixing(D)
SOURCES = _skewed(8000, D)
ROWS = (SOURCES @ MIXING + 5).float()


def _fitted(x: Tensor, n_latents: int | None = None, **options: float) -> ICA:
    return ICA(x.shape[1], n_latents, **options).fit(list(x.split(1000)), _moments(x))


@pytest.fixture(scope="module")
def ica() -> ICA:
    return _fitted(ROWS)


def test_ica_finds_planted_mixing_rows_and_not_the_unmixing_rows(ica: ICA) -> None:
    assert match(MIXING.float(), ica.directions).cosine.min() > 0.99
    unmixing = F.normalize(torch.linalg.inv(MIXING).T, dim=1).float()
    assert match(unmixing, ica.directions).cosine.min() < 0.9  # the two can be told apart
    assert match(unmixing, F.normalize(ica.unmixing.T, dim=1)).cosine.min() > 0.99


def test_ica_directions_are_those_of_scikit_learn(ica: ICA) -> None:
    reference = FastICA(D, fun="logcosh", whiten="unit-variance", random_state=0, tol=1e-5, max_iter=500)
    reference.fit(ROWS.double().numpy())
    theirs = F.normalize(torch.from_numpy(reference.mixing_.T).float(), dim=1)
    assert match(theirs, ica.directions).cosine.min() > 0.9999


def test_ica_latents_are_the_planted_sources_in_raw_units(ica: ICA) -> None:
    pairs = match(MIXING.float(), ica.directions).latent
    latents = ica.encode(ROWS).double()[:, pairs]
    correlation = ((latents - latents.mean(0)) / latents.std(0) * SOURCES).mean(0).abs()
    assert correlation.min() > 0.99
    torch.testing.assert_close(latents.std(0), torch.ones(D).double(), rtol=0.05, atol=0)
    torch.testing.assert_close(ica.decode(ica.encode(ROWS)), ROWS, rtol=0, atol=2e-5)


def test_ica_order_falls_in_negentropy_and_skew_is_positive(ica: ICA) -> None:
    assert (ica.negentropy.diff() <= 0).all() and (ica.negentropy > 0).all()
    latents = ica.encode(ROWS).double()
    assert (latents**3).mean(0).min() > 0
    y = latents / latents.std(0, correction=0)
    gaussian = torch.randn(1_000_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = (y.cosh().log().mean(0) - gaussian.cosh().log().mean()).square()
    torch.testing.assert_close(ica.negentropy.double(), expected, rtol=0.05, atol=1e-5)
    places = match(MIXING.float(), ica.directions).latent
    assert places[:3].max() < places[-3:].min()  # the heaviest tails were planted first


def test_ica_one_iteration_by_hand() -> None:
    x = ROWS[:500]
    moments = _moments(x)
    with pytest.warns(UserWarning, match=r"ICA stopped after passes=1: .* 1 - \|cos\| = .* raise `passes`"):
        ica = _fitted(x, passes=1)
    variances, vectors = torch.linalg.eigh(moments.covariance)
    whitening = vectors.flip(1) / variances.flip(0).sqrt()
    z = (x.double() - moments.mean) @ whitening
    start = torch.randn(D, D, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    left, _, right = torch.linalg.svd(start)
    y = z @ (left @ right).T
    step = y.tanh().T @ z / len(z) - (1 - y.tanh() ** 2).mean(0)[:, None] * (left @ right)
    left, _, right = torch.linalg.svd(step)
    unmixing = F.normalize(whitening @ (left @ right).T, dim=0).T.float()
    assert match(unmixing, F.normalize(ica.unmixing.T, dim=1)).cosine.min() > 1 - 1e-5


def test_ica_of_fewer_sources_lives_on_the_first_principal_components() -> None:
    ica = _fitted(ROWS, 3, tolerance=1e-3)
    moments = _moments(ROWS)
    first = torch.linalg.eigh(moments.covariance).eigenvectors[:, -3:].float()
    torch.testing.assert_close(ica.directions @ first @ first.T, ica.directions, atol=1e-5, rtol=0)
    projected = (ROWS - ica.mean) @ first @ first.T + ica.mean
    torch.testing.assert_close(ica(ROWS).x_hat, projected, atol=1e-4, rtol=0)


def test_ica_of_very_different_variances_is_as_exact() -> None:
    scales = torch.logspace(0, 4, D).double()  # eight digits between variances
    x = (SOURCES @ MIXING * scales).float()
    ica = _fitted(x)
    latents = ica.encode(x).double()
    correlations = torch.corrcoef(torch.cat([latents, SOURCES], dim=1).T)[:D, D:].abs()
    assert correlations.amax(0).min() > 0.99


def test_ica_does_not_depend_on_how_batches_are_cut() -> None:
    x, moments = ROWS[:1500], _moments(ROWS[:1500])
    fits = [ICA(D).fit(list(x.split(cut)), moments).components for cut in ([1500], [1, 700, 0, 799])]
    assert torch.equal(*fits)


def test_ica_seed_makes_the_start_and_not_the_sources(ica: ICA) -> None:
    other = _fitted(ROWS, seed=1)
    assert not torch.equal(other.components, ica.components)
    assert (other.components * ica.components).sum(1).min() > 0.999


def test_ica_of_bfloat16_rows_and_of_float64() -> None:
    half = ROWS.bfloat16()
    assert match(MIXING.float(), _fitted(half).directions).cosine.min() > 0.99
    x = ROWS.double()
    exact = ICA(D).double().fit([x], _moments(x))
    assert exact.encode(x).dtype == torch.float64
    torch.testing.assert_close(exact.decode(exact.encode(x)), x, rtol=0, atol=1e-10)


def test_ica_of_gaussian_rows_warns_of_what_moved() -> None:
    x = torch.randn(2000, 6, generator=torch.Generator().manual_seed(0))
    with pytest.warns(UserWarning, match="all but Gaussian"):
        _fitted(x, passes=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _fitted(x, passes=1, tolerance=2.0)


def test_ica_of_rows_that_span_too_little_raises_with_the_rank() -> None:
    flat = ROWS[:, :5] @ torch.randn(5, D) + 100
    with pytest.raises(InputError, match="rank of the rows' covariance, 5, got n_latents=8.*n_latents=5"):
        _fitted(flat)
    few = ROWS[:4]
    with pytest.raises(InputError, match="covariance, 3, got"):
        _fitted(few)
    assert _fitted(flat, 5, tolerance=1e-3).components.isfinite().all()


def test_ica_bad_input_raises() -> None:
    with pytest.raises(InputError, match=r"`n_latents` must be in \[1, d_model=4\], got n_latents=5"):
        ICA(4, 5)
    with pytest.raises(InputError, match="`passes` must be at least 1, got passes=0"):
        ICA(4, passes=0)
    with pytest.raises(InputError, match="`tolerance` must be at least 0, got tolerance=-1"):
        ICA(4, tolerance=-1.0)
