"""int8 rows: an error of at most half a step, and large coordinates that do not spoil the others."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.ops.int8 import MOST_OUTLIERS, dequantise, outlier_coordinates, quantise

NONE = torch.empty(0, dtype=torch.int64)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 99), st.integers(1, 40), st.integers(1, 30), st.floats(-30, 30))
def test_error_is_at_most_half_a_step(seed, rows, d_model, log_scale):
    x = torch.randn(rows, d_model, generator=torch.Generator().manual_seed(seed)) * 2.0**log_scale
    step = x.abs().amax(1, keepdim=True) / 127
    assert ((dequantise(quantise(x, NONE), NONE) - x).abs() <= 0.5001 * step).all()


def test_a_row_by_hand():
    rows = quantise(torch.tensor([[127.0, -63.5, 0.4, 0.0], [0.0, 0.0, 0.0, 0.0]]), NONE)
    assert rows.scale.tolist() == [1.0, 0.0]
    assert rows.values.tolist() == [[127, -64, 0, 0], [0, 0, 0, 0]]
    assert dequantise(rows, NONE).tolist() == [[127.0, -64.0, 0.0, 0.0], [0.0] * 4]


def test_outlier_coordinates_are_kept_exactly_and_others_gain():
    x = torch.randn(500, 96)
    x[:, 17] += 300
    x[:, 40] *= 80
    outliers = outlier_coordinates(x)
    assert outliers.tolist() == [17, 40]
    apart, together = (dequantise(quantise(x, o), o) for o in (outliers, NONE))
    assert torch.equal(apart[:, outliers], x[:, outliers])
    rest = [i for i in range(96) if i not in (17, 40)]
    error = [(y - x)[:, rest].square().mean() for y in (apart, together)]
    assert error[0] < error[1] / 1000


def test_no_more_than_a_few_coordinates_stand_apart_the_largest():
    x = torch.randn(100, 64)
    x = x / x.square().mean(0).sqrt()
    x[:, :10] *= torch.arange(100, 110)
    assert outlier_coordinates(x).tolist() == [8, 9] and int(64 * MOST_OUTLIERS) == 2
    assert outlier_coordinates(torch.randn(100, 64)).tolist() == []


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_shows_in_its_scale_or_outliers(bad):
    x = torch.randn(3, 8)
    x[1, 4] = bad
    rows = quantise(x, torch.tensor([2]))
    assert rows.scale.isfinite().tolist() == [True, False, True]
    rows = quantise(x, torch.tensor([4]))
    assert rows.outliers.isfinite().squeeze(1).tolist() == [True, False, True]
