"""Streamed moments equal the ones of all rows at once."""

from __future__ import annotations

import pytest
import torch

from sae.errors import InputError
from sae.ops.moments import Moments, StreamingMoments


def _moments(rows: torch.Tensor, sizes: list[int] | None = None) -> Moments:
    streaming = StreamingMoments()
    for part in rows.split(sizes if sizes else len(rows)):
        streaming.add(part)
    return streaming.moments()


def test_moments_of_three_rows_by_hand() -> None:
    moments = _moments(torch.tensor([[1.0, 0.0], [3.0, 0.0], [2.0, 3.0]]))
    assert moments.count == 3
    torch.testing.assert_close(moments.mean, torch.tensor([2.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(moments.second, torch.tensor([[14.0, 6], [6, 9]], dtype=torch.float64) / 3)
    torch.testing.assert_close(moments.covariance, torch.tensor([[2 / 3, 0], [0, 2]], dtype=torch.float64))
    assert moments.mean_squared_norm == pytest.approx(23 / 3)
    assert moments.total_variance == pytest.approx(8 / 3)


def test_moments_any_cut_of_the_rows_gives_the_same() -> None:
    rows = torch.randn(9000, 5, generator=torch.Generator().manual_seed(0))
    cut, whole = _moments(rows, [1, 0, 4999, 4000]), _moments(rows)
    assert cut.count == whole.count == 9000
    torch.testing.assert_close(cut.mean, whole.mean, rtol=0, atol=1e-13)
    torch.testing.assert_close(cut.second, whole.second, rtol=0, atol=1e-13)


def test_moments_covariance_is_the_biased_one() -> None:
    rows = torch.randn(50, 4, generator=torch.Generator().manual_seed(0)).double()
    torch.testing.assert_close(_moments(rows).covariance, rows.T.cov(correction=0))


def test_moments_survive_a_mean_far_from_zero() -> None:
    rows = torch.randn(5000, 3, generator=torch.Generator().manual_seed(0)).double() + 1e4
    torch.testing.assert_close(_moments(rows).covariance, rows.T.cov(correction=0), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_moments_of_half_precision_rows_are_float64(dtype: torch.dtype) -> None:
    rows = torch.randn(5000, 3, generator=torch.Generator().manual_seed(0)).to(dtype) + 100
    moments = _moments(rows)
    assert moments.mean.dtype == moments.second.dtype == torch.float64
    torch.testing.assert_close(moments.mean, rows.double().mean(0), rtol=1e-12, atol=0)


def test_moments_without_rows_raise() -> None:
    streaming = StreamingMoments()
    with pytest.raises(InputError, match="at least one row, got none"):
        streaming.moments()
    streaming.add(torch.empty(0, 3))
    with pytest.raises(InputError, match="at least one row, got none"):
        streaming.moments()


def test_moments_of_another_width_raise() -> None:
    streaming = StreamingMoments()
    streaming.add(torch.ones(2, 3))
    with pytest.raises(InputError, match="d_model=3 columns.*got 4"):
        streaming.add(torch.ones(2, 4))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_moments_of_rows_that_are_not_finite_raise(bad: float) -> None:
    with pytest.raises(InputError, match="must be finite"):
        _moments(torch.tensor([[1.0, bad], [0.0, 1.0]]))
