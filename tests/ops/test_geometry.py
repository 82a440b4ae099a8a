"""Nearest neighbours among directions: in chunks as all at once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from sae.ops.geometry import coherence, nearest_neighbour_cosines


def test_nearest_neighbour_cosines_by_hand():
    # 3-4-5 triangles: row 2 lies at cosine 0.6 with row 0 and 0.8 with row 1; row 3 is row 0 turned round.
    rows = torch.tensor(
        [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [3.0, 4.0, 0.0], [-2.0, 0.0, 0.0], [0.0, 0.0, 1.0]]
    )
    expected = [1.0, 0.8, 0.8, 1.0, 0.0]
    for chunk in (1, 2, 3, 5, 100):
        assert nearest_neighbour_cosines(rows, chunk).tolist() == pytest.approx(expected)


@settings(max_examples=40, deadline=None)
@given(n=st.integers(2, 30), d_model=st.integers(1, 8), chunk=st.integers(1, 40), seed=st.integers(0, 10**6))
def test_nearest_neighbour_cosines_equal_the_naive_ones(n, d_model, chunk, seed):
    rows = torch.randn(n, d_model, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = nearest_neighbour_cosines(rows, chunk)
    for i in range(n):
        others = [abs(float(F.cosine_similarity(rows[i], rows[j], dim=0))) for j in range(n) if j != i]
        assert float(found[i]) == pytest.approx(max(others), abs=1e-9)
    assert float(found.max()) == pytest.approx(coherence(rows), abs=1e-9)


def test_one_direction_has_no_neighbour():
    assert nearest_neighbour_cosines(torch.ones(1, 4)).tolist() == [0.0]


def test_nearest_neighbour_cosines_never_hold_all_pairs(monkeypatch):
    largest = 0
    real = torch.Tensor.__matmul__

    def watched(a, b):
        nonlocal largest
        product = real(a, b)
        largest = max(largest, product.numel())
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    nearest_neighbour_cosines(torch.randn(600, 4), chunk=16)
    assert 0 < largest <= 16 * 600
