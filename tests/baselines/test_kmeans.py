"""K-means against scikit-learn, on planted clusters, and its promises."""

from __future__ import annotations

import pytest
import torch
from sklearn.cluster import KMeans as SkKMeans
from torch import Tensor

from sae.baselines import KMeans
from sae.baselines.kmeans import spread_start
from sae.errors import InputError
from sae.ops.moments import Moments, StreamingMoments


def _moments(x: Tensor) -> Moments:
    streaming = StreamingMoments()
    streaming.add(x)
    return streaming.moments()


def _clusters(n: int = 3000, d: int = 10, clusters: int = 12, spread: float = 0.3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    centres = 3 * torch.randn(clusters, d, generator=generator) + 20
    rows = centres[torch.randint(clusters, (n,), generator=generator)]
    return rows + spread * torch.randn(n, d, generator=generator), centres


def _fitted(x: Tensor, n_latents: int, **options: float) -> KMeans:
    return KMeans(x.shape[1], n_latents, **options).fit(list(x.split(700)), _moments(x))


def _inertia(kmeans: KMeans, x: Tensor) -> float:
    return (x - kmeans(x).x_hat).double().square().sum().item()


def test_kmeans_of_two_pairs_by_hand() -> None:
    x = torch.tensor([[1.0, 1.0], [3.0, 1.0], [-1.0, -4.0], [-3.0, -4.0]])  # mean (0, -1.5)
    kmeans = _fitted(x, 2)
    order = kmeans.centroids[:, 0].argsort()
    torch.testing.assert_close(kmeans.centroids[order], torch.tensor([[-2.0, -4.0], [2.0, 1.0]]))
    torch.testing.assert_close(kmeans.lengths, torch.full((2,), 10.25**0.5))
    torch.testing.assert_close(kmeans(x).x_hat, kmeans.centroids[order][[1, 1, 0, 0]])
    assert (kmeans.encode(x) != 0).sum(1).tolist() == [1, 1, 1, 1]


def test_kmeans_finds_planted_clusters() -> None:
    x, centres = _clusters()
    kmeans = _fitted(x, 12)
    assert torch.cdist(centres, kmeans.centroids).amin(1).max() < 0.15
    nearest = torch.cdist(x, kmeans.centroids).argmin(1)
    assert torch.equal(kmeans.encode(x).argmax(1), nearest)


@pytest.mark.parametrize("n_latents", [5, 40])
def test_kmeans_error_is_that_of_scikit_learn(n_latents: int) -> None:
    x, _ = _clusters(spread=2.0)
    expected = SkKMeans(n_latents, n_init=3, random_state=0).fit(x.numpy()).inertia_
    assert _inertia(_fitted(x, n_latents, passes=100), x) <= 1.02 * expected


def test_kmeans_from_the_same_start_ends_as_scikit_learn(monkeypatch) -> None:
    x, _ = _clusters(spread=2.0)
    start = x[:9]
    monkeypatch.setattr("sae.baselines.kmeans.spread_start", lambda rows, *_: rows[:9])
    ours = _fitted(x, 9, passes=200, tolerance=0.0)
    theirs = SkKMeans(9, init=start.numpy(), n_init=1, tol=0, max_iter=200).fit(x.numpy())
    assert _inertia(ours, x) == pytest.approx(theirs.inertia_, rel=1e-4)
    assert torch.cdist(ours.centroids, torch.from_numpy(theirs.cluster_centers_)).amin(1).max() < 1e-2


def test_kmeans_start_takes_every_far_cluster() -> None:
    x, centres = _clusters(spread=0.01)
    for seed in range(5):
        start = spread_start(x - 20, 12, torch.Generator().manual_seed(seed)) + 20
        assert torch.cdist(centres, start).amin(1).max() < 0.2


def test_kmeans_cluster_without_rows_restarts_at_the_farthest_row(monkeypatch) -> None:
    x = torch.cat([torch.randn(200, 3), torch.randn(200, 3) + 30, torch.full((1, 3), -90.0)])
    monkeypatch.setattr("sae.baselines.kmeans.spread_start", lambda rows, *_: rows[[0, 0, 0]])
    kmeans = _fitted(x, 3)
    assert torch.cdist(x[-1:], kmeans.centroids).min() < 1e-2
    assert (kmeans.encode(x) != 0).sum(0).sort().values.tolist() == [1, 200, 200]


def test_kmeans_of_fewer_different_rows_than_clusters_warns() -> None:
    x = torch.tensor([[0.0, 1.0], [2.0, 3.0], [4.0, 4.0]]).repeat(10, 1)
    with pytest.warns(UserWarning, match="found no rows for 2 of 5 clusters.*lower `n_latents`"):
        kmeans = _fitted(x, 5)
    torch.testing.assert_close(kmeans(x).x_hat, x)
    torch.testing.assert_close(kmeans.directions.norm(dim=1), torch.ones(5))


def test_kmeans_of_one_cluster_is_the_mean() -> None:
    x, _ = _clusters(200)
    kmeans = _fitted(x, 1)
    assert (kmeans.encode(x) == 0).all() and len(kmeans.encode_sparse(x).values) == 0
    torch.testing.assert_close(kmeans(x).x_hat, x.mean(0).expand_as(x))
    torch.testing.assert_close(kmeans.directions.norm(dim=1), torch.ones(1))
    assert len(kmeans.sparse_code(x, 1).values) == 0


def test_kmeans_sparse_code_is_nonnegative_and_no_worse_than_one_centroid() -> None:
    x, _ = _clusters(spread=2.0)
    kmeans = _fitted(x, 12)
    code = kmeans.sparse_code(x, 1)
    assert (code.values > 0).all()
    # One coefficient that is free is at least as good as that of the centroid.
    assert (x - kmeans.decode_sparse(code)).square().sum().item() <= _inertia(kmeans, x)


def test_kmeans_does_not_depend_on_how_batches_are_cut() -> None:
    x, _ = _clusters(1500, spread=2.0)
    moments = _moments(x)
    fits = [KMeans(10, 8).fit(list(x.split(cut)), moments).components for cut in ([1500], [1, 700, 0, 799])]
    assert torch.equal(*fits)


def test_kmeans_stopped_by_passes_warns() -> None:
    x, _ = _clusters(spread=3.0)
    with pytest.warns(UserWarning, match="KMeans stopped after passes=1: .* moved centroids by"):
        _fitted(x, 30, passes=1)


def test_kmeans_takes_leading_axes_and_half_precision() -> None:
    x, _ = _clusters(240)
    kmeans = _fitted(x.bfloat16(), 6)
    latents = kmeans.encode(x.reshape(4, 60, 10))
    assert torch.equal(latents.reshape(240, 6), kmeans.encode(x))
    assert kmeans.components.isfinite().all()


def test_kmeans_bad_input_raises() -> None:
    x, _ = _clusters(6)
    with pytest.raises(InputError, match="`n_latents` must be at most the number of rows, 6, got"):
        _fitted(x, 7)
    with pytest.raises(InputError, match="`passes` must be at least 1, got passes=0"):
        KMeans(4, 2, passes=0)
    with pytest.raises(InputError, match="`tolerance` must be at least 0, got tolerance=-1"):
        KMeans(4, 2, tolerance=-1.0)
