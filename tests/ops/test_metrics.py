"""Reconstruction scores against closed forms."""

import pytest
import torch

from sae.errors import InputError
from sae.ops.metrics import ReconstructionMetrics
from sae.ops.sparse import from_dense


def _scores(x, x_hat, latents=None, mean=None, first=None, batch=3):
    latents = torch.zeros(len(x), 2) if latents is None else latents
    metrics = ReconstructionMetrics(latents.shape[1], x.mean(0) if mean is None else mean)
    for rows in torch.arange(len(x)).split(batch):
        metrics.add(x[rows], x_hat[rows], from_dense(latents[rows]), None if first is None else first[rows])
    return metrics.compute()


def test_fvu_is_one_for_the_mean_and_zero_for_a_copy():
    x = torch.randn(10, 4) + 100.0
    assert _scores(x, x.double().mean(0).expand_as(x).float()).fvu == pytest.approx(1.0, abs=1e-9)
    assert _scores(x, x).fvu == 0.0


def test_fvu_is_about_the_mean_of_the_scored_rows_by_hand():
    x, x_hat = torch.tensor([[0.0], [2.0]]), torch.tensor([[0.0], [1.0]])
    assert _scores(x, x_hat, mean=torch.tensor([50.0])).fvu == pytest.approx(0.5)  # 1 / (1 + 1)


def test_fvu_does_not_depend_on_batches_or_an_offset():
    x = torch.randn(20, 5, dtype=torch.float64)
    x_hat = x + 0.1 * torch.randn(20, 5, dtype=torch.float64)
    reference = ((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    for batch in (1, 7, 20):
        for offset in (0.0, 1e4):
            assert _scores(x + offset, x_hat + offset, batch=batch).fvu == pytest.approx(
                float(reference), rel=1e-9
            )


def test_first_positions_are_left_out_of_their_own_figure_only():
    x = torch.tensor([[1000.0], [0.0], [2.0]])
    x_hat = torch.tensor([[0.0], [0.0], [1.0]])
    scores = _scores(x, x_hat, first=torch.tensor([True, False, False]))
    assert scores.fvu_without_first_position == pytest.approx(0.5)
    assert scores.fvu > 0.9
    assert _scores(x, x_hat).fvu_without_first_position is None


def test_l0_and_dead_count_non_zero_latents_by_hand():
    latents = torch.tensor([[1.0, 0.0, -2.0, 0.0], [0.0, 0.0, 3.0, 0.0]])
    scores = _scores(torch.randn(2, 3), torch.randn(2, 3), latents)
    assert scores.l0 == 1.5 and scores.dead_fraction == 0.5


def test_densities_are_shares_of_all_rows_by_hand():
    latents = torch.tensor([[1.0, 0.0, 2.0], [0.5, 0.0, 0.0], [3.0, 0.0, -1.0], [0.0, 0.0, 0.0]])
    metrics = ReconstructionMetrics(3, torch.zeros(2))
    for rows in (slice(0, 1), slice(1, 4)):
        metrics.add(torch.randn(4, 2)[rows], torch.randn(4, 2)[rows], from_dense(latents[rows]), None)
    assert metrics.densities.tolist() == [0.75, 0.0, 0.5]
    scores = metrics.compute()
    assert scores.dead_fraction == pytest.approx(1 / 3)
    assert scores.l0 == pytest.approx(float(metrics.densities.sum()))


def test_cosine_and_median_by_hand():
    x = torch.tensor([[3.0, 0.0], [0.0, 2.0], [1.0, 0.0]])
    x_hat = torch.tensor([[6.0, 0.0], [2.0, 0.0], [1.0, 0.0]])
    scores = _scores(x, x_hat, mean=torch.zeros(2))
    assert scores.cosine == pytest.approx(2 / 3)
    assert scores.fvu_median == pytest.approx(1.0)  # 9/9, 8/4, 0/1


def test_no_rows_is_an_error():
    with pytest.raises(InputError, match="no held-out rows"):
        ReconstructionMetrics(4, torch.zeros(3)).compute()
    with pytest.raises(InputError, match="no held-out rows"):
        _ = ReconstructionMetrics(4, torch.zeros(3)).densities
