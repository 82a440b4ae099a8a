"""Capture and recapture: hand cases, and populations of known size."""

import math

import pytest
import torch

from sae.errors import InputError
from sae.ops.population import (
    bootstrap_interval,
    chao,
    chao_lee,
    chapman,
    expected_singletons,
    jackknife,
    level_singletons,
    lincoln_petersen,
)


def _caught(chances, occasions, seed):
    """f_1 ... f_S of a population whose members are caught with these chances."""
    generator = torch.Generator().manual_seed(seed)
    times = (torch.rand(occasions, len(chances), generator=generator) < chances).sum(0)
    return torch.bincount(times, minlength=occasions + 1)[1:]


def test_two_occasions_by_hand():
    assert lincoln_petersen(30, 20, 12) == 50.0 and lincoln_petersen(3, 2, 0) == math.inf
    assert chapman(30, 20, 12).value == pytest.approx(31 * 21 / 13 - 1)
    assert chapman(20, 20, 20) == (20, 20, 20)


def test_chao_and_jackknife_by_hand():
    f = torch.tensor([10, 4, 6])
    assert chao(f).value == pytest.approx(20 + 2 / 3 * 10 * 9 / (2 * 5))
    assert jackknife(f).value == pytest.approx(20 + 2 / 3 * 10)
    assert jackknife(f, order=2).value == pytest.approx(20 + 3 / 3 * 10 - 1 / 6 * 4)


def test_what_all_occasions_caught_is_all_there_is():
    f = torch.tensor([0, 0, 0, 0, 40])
    for estimate in (chao(f), jackknife(f), chapman(40, 40, 40)):
        assert estimate == (40, 40, 40)
    assert chao_lee(f) == 40 and expected_singletons(f) == 0 == level_singletons(f)


def test_equal_chances_are_covered_as_often_as_the_interval_says():
    inside = [
        low <= 200 <= high
        for _, low, high in (chao(_caught(torch.full((200,), 0.4), 5, s)) for s in range(100))
    ]
    assert 80 <= sum(inside) <= 99


def test_chao_is_a_lower_bound_where_chances_differ():
    chances = torch.linspace(0, 1, 400) ** 3  # many that are all but never caught
    values = torch.tensor([chao(_caught(chances, 5, seed)).value for seed in range(50)])
    assert 200 < values.mean() < 400


def test_singletons_that_are_nothing_are_told_from_the_others():
    chances = torch.rand(600, generator=torch.Generator().manual_seed(0))
    f = _caught(chances, 5, 1)
    spurious = f.clone()
    spurious[0] += 300
    assert level_singletons(spurious) == pytest.approx(float(f[0]), rel=0.2)
    assert level_singletons(spurious) <= spurious[0]
    assert expected_singletons(spurious) < spurious[0]


def test_a_bootstrap_is_about_the_estimate_and_the_same_for_a_seed():
    f = _caught(torch.full((100,), 0.5), 5, 0)
    found = bootstrap_interval(lambda f: chao(f).value, f, draws=200)
    assert found.low <= found.value <= found.high and found.low >= f.sum()
    assert bootstrap_interval(lambda f: chao(f).value, f, draws=200) == found


def test_impossible_counts_are_errors():
    with pytest.raises(InputError, match=r"`both` must be in \[0, min\(n_a, n_b\)=2\], got 3"):
        lincoln_petersen(2, 5, 3)
    with pytest.raises(InputError, match="`frequencies` must be counts for at least 2 seeds"):
        chao(torch.tensor([3]))
    with pytest.raises(InputError, match="`order` must be 1 or 2"):
        jackknife(torch.tensor([3, 1]), order=3)
    with pytest.raises(InputError, match="at least 3 seeds"):
        level_singletons(torch.tensor([3, 1]))
    with pytest.raises(InputError, match=r"`level` must be in \(0, 1\)"):
        chao(torch.tensor([3, 1]), level=90.0)
