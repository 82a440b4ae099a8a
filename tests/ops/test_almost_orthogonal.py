"""Almost-orthogonal subsets: hand-sized sets, every pair checked, and the two ways against one another."""

import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from sae.errors import InputError
from sae.ops import almost_orthogonal
from sae.ops.almost_orthogonal import Packing, largest_almost_orthogonal_subset, sizes_by_epsilon
from sae.ops.geometry import random_rows


@pytest.fixture(params=["bits", "blocks"])
def way(request, monkeypatch):
    """Both ways of finding conflicts, for any number of rows."""
    if request.param == "blocks":
        monkeypatch.setattr(almost_orthogonal, "_MOST_BITS", 0)
    return request.param


def conflicts(rows, epsilon):
    unit = F.normalize(rows.double(), dim=1)
    return (unit @ unit.T).abs().fill_diagonal_(0) >= epsilon


def test_a_basis_is_kept_whole(way):
    basis = torch.linalg.qr(torch.randn(20, 20)).Q
    assert largest_almost_orthogonal_subset(3 * basis, 0.01).tolist() == list(range(20))


def test_of_equal_and_opposite_rows_one_is_kept(way):
    rows = torch.cat([torch.eye(6), 2 * torch.eye(6), -torch.eye(6)])
    kept = largest_almost_orthogonal_subset(rows, 0.9)
    assert len(kept) == 6
    assert sorted((kept % 6).tolist()) == list(range(6))


def test_the_bound_itself_is_a_conflict(way):
    rows = torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    assert len(largest_almost_orthogonal_subset(rows, 0.6)) == 1
    assert len(largest_almost_orthogonal_subset(rows, 0.601)) == 2


def test_fewest_conflicts_first_finds_the_points_of_a_star(way):
    # Row 0 conflicts with all others, which do not among themselves: begun with it, greed ends with one.
    rows = torch.cat([torch.ones(1, 9), torch.eye(9)])
    assert largest_almost_orthogonal_subset(rows, 0.3, orders=0).tolist() == list(range(1, 10))


@pytest.mark.parametrize("epsilon", [0.15, 0.4, 0.7])
def test_what_is_kept_has_no_conflict_and_can_take_no_more(way, epsilon):
    rows = torch.randn(700, 12)
    kept = largest_almost_orthogonal_subset(rows, epsilon, orders=3)
    close = conflicts(rows, epsilon)
    assert kept.equal(kept.unique())
    assert not close[kept][:, kept].any()
    rest = torch.ones(700, dtype=torch.bool).index_fill(0, kept, False)
    assert conflicts(rows, epsilon - 1e-5)[rest][:, kept].any(dim=1).all()


def test_both_ways_keep_the_same(monkeypatch):
    rows = random_rows(900, 16, torch.Generator().manual_seed(0))
    for epsilon in (0.3, 0.5):
        by_bits = largest_almost_orthogonal_subset(rows, epsilon, orders=4)
        for offered, held in ((512, 2048), (37, 10)):
            with monkeypatch.context() as patch:
                patch.setattr(almost_orthogonal, "_MOST_BITS", 0)
                patch.setattr(almost_orthogonal, "_OFFERED", offered)
                patch.setattr(almost_orthogonal, "_SLICE", held)
                assert largest_almost_orthogonal_subset(rows, epsilon, orders=4).equal(by_bits)


def test_never_more_than_the_largest_and_on_small_sets_all_of_it():
    rows = random_rows(10, 4, torch.Generator().manual_seed(3))
    for epsilon in (0.3, 0.5, 0.7):
        close = conflicts(rows, epsilon)
        largest = max(
            len(some)
            for size in range(11)
            for some in itertools.combinations(range(10), size)
            if not close[list(some)][:, list(some)].any()
        )
        assert len(largest_almost_orthogonal_subset(rows, epsilon, orders=60)) == largest


def test_more_orders_never_find_less_and_a_seed_repeats_itself():
    # 1440 lines in the plane, 1/8 degree apart: all have equally many conflicts, so that order is all.
    angles = torch.randperm(1440) * torch.pi / 1440
    rows, bound = torch.stack([angles.cos(), angles.sin()], dim=1), math.cos(math.radians(3.06))
    found = [largest_almost_orthogonal_subset(rows, bound, orders) for orders in (0, 1, 5, 20)]
    sizes = [len(kept) for kept in found]
    assert sizes == sorted(sizes) and sizes[0] < sizes[-1] <= 57
    assert found[-1].equal(largest_almost_orthogonal_subset(rows, bound))
    seeds = [largest_almost_orthogonal_subset(rows, bound, 2, seed=seed) for seed in range(4)]
    assert len({tuple(kept.tolist()) for kept in seeds}) > 1


def test_only_candidates_are_chosen():
    rows = torch.cat([torch.eye(8), torch.eye(8)])
    kept = largest_almost_orthogonal_subset(rows, 0.5, candidates=torch.tensor([9, 2, 10, 12, 9]))
    assert len(kept) == 3
    assert {9, 12} < set(kept.tolist()) < {2, 9, 10, 12}
    with pytest.raises(InputError, match=r"`candidates` must be in \[0, 16\)"):
        largest_almost_orthogonal_subset(rows, 0.5, candidates=torch.tensor([16]))


def test_sizes_stand_beside_random_rows_of_the_same_shape(monkeypatch):
    rows = torch.cat([torch.eye(24)] * 5)
    sizes = sizes_by_epsilon(rows, [0.2, 0.5, 0.9], orders=2, seed=4)
    assert [size.epsilon for size in sizes] == [0.2, 0.5, 0.9]
    assert [size.found for size in sizes] == [24, 24, 24]
    null = random_rows(120, 24, torch.Generator().manual_seed(4))
    expected = [len(largest_almost_orthogonal_subset(null, e, 2, seed=4)) for e in (0.2, 0.5, 0.9)]
    assert [size.random for size in sizes] == expected
    assert expected[0] < 24 and expected[2] == 120
    monkeypatch.setattr(almost_orthogonal, "_BYTES", 1)  # one epsilon at a time
    assert sizes_by_epsilon(rows, [0.2, 0.5, 0.9], orders=2, seed=4) == sizes


def test_half_and_double_precision_are_taken():
    for dtype in (torch.bfloat16, torch.float64):
        assert len(largest_almost_orthogonal_subset(torch.eye(9, dtype=dtype), 0.1)) == 9


def test_a_packing_keeps_as_if_rows_came_one_by_one(monkeypatch):
    monkeypatch.setattr(almost_orthogonal, "_SLICE", 8)
    rows = random_rows(300, 8, torch.Generator().manual_seed(0))
    close, kept = conflicts(rows, 0.5), []
    for i in range(300):
        if not close[i, kept].any():
            kept.append(i)
    for size in (1, 7, 300):
        packing = Packing(8, 0.5)
        places = [packing.offer(part) + begin * size for begin, part in enumerate(rows.split(size))]
        assert torch.cat(places).tolist() == kept
        assert packing.rows.equal(rows[kept]) and len(packing) == len(kept)


def test_subsets_refuse_bad_input():
    rows = torch.eye(3)
    for epsilon in (0.0, 1.0):
        with pytest.raises(InputError, match="`epsilon` must be in"):
            largest_almost_orthogonal_subset(rows, epsilon)
    with pytest.raises(InputError, match="`orders` must be at least 0"):
        largest_almost_orthogonal_subset(rows, 0.5, orders=-1)
    with pytest.raises(InputError, match="finite rows other than zero"):
        largest_almost_orthogonal_subset(torch.zeros(3, 3), 0.5)
