"""Directions among one another: hand-sized sets, naive loops, random rows; block by block."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from sae.errors import InputError
from sae.ops import geometry
from sae.ops.geometry import (
    QUANTILES,
    CofiringCoherence,
    cofiring_coherence,
    coherence,
    geometry_of,
    nearest_neighbour_cosines,
    nearest_neighbour_null,
    random_rows,
)
from sae.ops.sparse import SparseLatents, from_dense


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


def test_geometry_of_a_basis():
    found = geometry_of(3 * torch.eye(5), firings=torch.ones(5, dtype=torch.int64))
    assert found.coherence == found.welch == found.mean_square == found.nearest_mean == 0
    assert found.frame_potential == pytest.approx(1)
    assert found.effective_rank == pytest.approx(5) and found.participation_ratio == pytest.approx(5)
    assert found.antipodal_pairs == 0 and found.effective_size == pytest.approx(5)


def test_geometry_by_hand():
    # Two copies of e1, its opposite, and e2: singular values sqrt 3 and 1; cos² sums to 9 + 1.
    rows = torch.tensor([[1.0, 0.0], [2.0, 0.0], [-1.0, 0.0], [0.0, 5.0]])
    found = geometry_of(rows, firings=torch.tensor([1.0, 1.0, 0.0, 2.0]))
    assert found.n == 4 and found.d_model == 2
    assert found.coherence == pytest.approx(1) and found.nearest_mean == pytest.approx(0.75)
    assert found.frame_potential == pytest.approx(10 / 8)
    assert found.mean_square == pytest.approx(6 / 12)
    assert found.participation_ratio == pytest.approx(16 / 10)
    share = 3**0.5 / (1 + 3**0.5)
    entropy = -share * math.log(share) - (1 - share) * math.log(1 - share)
    assert found.effective_rank == pytest.approx(math.exp(entropy))
    assert found.antipodal_pairs == 2
    assert found.effective_size == pytest.approx(math.exp(1.5 * math.log(2)))


def test_geometry_of_equiangular_lines_is_a_tight_frame_at_the_welch_bound():
    # The 6 diagonals of the icosahedron.
    golden = (1 + 5**0.5) / 2
    rows = torch.tensor([[0.0, 1.0, s * golden] for s in (1, -1)])
    rows = torch.cat([rows.roll(shift, 1) for shift in range(3)])
    found = geometry_of(rows)
    assert found.coherence == pytest.approx(5**-0.5, rel=1e-6)
    assert found.welch == pytest.approx(5**-0.5)
    assert found.frame_potential == pytest.approx(1)
    assert found.effective_rank == pytest.approx(3)


def test_geometry_equals_the_naive_one_over_many_tiles(monkeypatch):
    monkeypatch.setattr(geometry, "_TILE", 7)
    rows = torch.randn(45, 6)
    rows[3] = -2 * rows[40]
    found = geometry_of(rows)
    unit = F.normalize(rows.double(), dim=1)
    cosines = (unit @ unit.T).fill_diagonal_(0)
    nearest = cosines.abs().amax(1)
    expected = np.quantile(nearest.numpy(), QUANTILES)
    assert found.nearest.tolist() == pytest.approx(expected, abs=1e-6)
    assert found.nearest_mean == pytest.approx(float(nearest.mean()), abs=1e-6)
    assert found.coherence == pytest.approx(1)
    assert found.antipodal_pairs == int((cosines.triu() < -0.5).sum())
    assert found.mean_square == pytest.approx(float(cosines.square().sum()) / (45 * 44))
    values = torch.linalg.svdvals(unit)
    shares = values / values.sum()
    assert found.effective_rank == pytest.approx(float((-shares * shares.log()).sum().exp()))


def test_geometry_never_holds_all_pairs(monkeypatch):
    monkeypatch.setattr(geometry, "_TILE", 64)
    largest = 0
    real = torch.Tensor.__matmul__

    def watched(a, b):
        nonlocal largest
        product = real(a, b)
        largest = max(largest, product.numel())
        return product

    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    geometry_of(torch.randn(1000, 4))
    assert 0 < largest <= 64 * 64


def test_random_rows_have_the_null_nearest_neighbours():
    found = geometry_of(random_rows(2000, 24, torch.Generator().manual_seed(0)))
    assert found.nearest.tolist() == pytest.approx(nearest_neighbour_null(2000, 24).tolist(), rel=0.015)
    assert found.frame_potential == pytest.approx(1, abs=0.02)
    assert found.mean_square == pytest.approx(1 / 24, rel=0.02)


def test_nearest_neighbour_null_by_hand():
    # On the sphere |cos| is uniform: the largest of two exceeds t with probability 1 - t².
    assert nearest_neighbour_null(3, 3, [0.25, 0.5]).tolist() == pytest.approx([0.5, 0.5**0.5])
    median = nearest_neighbour_null(32_768, 768, [0.5])
    assert float(median) == pytest.approx(0.15, abs=0.01)


def test_random_rows_are_the_same_for_a_seed():
    draw = [random_rows(5, 3, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert draw[0].equal(draw[1]) and not draw[0].equal(draw[2])
    assert draw[0].norm(dim=1).tolist() == pytest.approx([1.0] * 5)


def test_cofirings_by_hand():
    # Row 0: e1 and (0.6, 0.8), both positive; row 1: the same two against one another; row 2: e1, e2 alone.
    rows = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    code = from_dense(torch.tensor([[2.0, 1.0, 0.0], [3.0, -1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 7.0, 0.0]]))
    found = cofiring_coherence(rows, [code])
    assert found.pairs == 3
    assert found.mean_square == pytest.approx(2 * 0.36 / 3)
    assert found.mean_abs == pytest.approx(2 * 0.6 / 3)
    assert found.signed == pytest.approx(0, abs=1e-7)
    assert geometry_of(rows, cofirings=[code]).cofirings == found


@pytest.mark.parametrize("budget", [1, 300, 2**23])
def test_cofirings_equal_the_naive_ones_in_any_batches_and_blocks(monkeypatch, budget):
    monkeypatch.setattr(geometry, "_BUDGET", budget)
    rows = torch.randn(12, 5)
    latents = torch.randn(40, 12) * (torch.rand(40, 12) < torch.rand(40, 1))
    latents[-1] = 0
    unit = F.normalize(rows.double(), dim=1)
    terms = []
    for row in latents.double():
        for i, j in itertools.combinations(row.nonzero().squeeze(1).tolist(), 2):
            terms.append(float(unit[i] @ unit[j]) * float((row[i] * row[j]).sign()))
    terms = np.array(terms)
    measured = CofiringCoherence(rows)
    for part in latents.split(9):
        measured.add(from_dense(part))
    found = measured.compute()
    assert found.pairs == len(terms)
    expected = [np.square(terms).mean(), np.abs(terms).mean(), terms.mean()]
    assert list(found[1:]) == pytest.approx(expected, abs=1e-6)


def test_entries_of_zero_do_not_fire_together():
    code = SparseLatents(torch.tensor([1.0, 0.0]), torch.tensor([0, 1]), torch.tensor([0, 2]))
    assert cofiring_coherence(torch.eye(2), [code]) == (0, None, None, None)


def test_geometry_refuses_bad_input():
    rows = torch.eye(3)
    for bad in (float("nan"), 0.0):
        with pytest.raises(InputError, match="got 1 bad ones of 3"):
            geometry_of(torch.tensor([[1.0, 0.0], [0.0, 1.0], [bad, 0.0]]))
    with pytest.raises(InputError, match="`firings` must have one number for each of the 3"):
        geometry_of(rows, firings=torch.ones(3)[:2])
    with pytest.raises(InputError, match="`firings` must be finite"):
        geometry_of(rows, firings=torch.zeros(3))
    with pytest.raises(InputError, match="`indices` must be in"):
        cofiring_coherence(rows, [from_dense(torch.ones(1, 4))])
    with pytest.raises(InputError, match="must be at least 2"):
        nearest_neighbour_null(1, 5)
    with pytest.raises(InputError, match="`quantiles` must be in"):
        nearest_neighbour_null(5, 5, [1.0])
