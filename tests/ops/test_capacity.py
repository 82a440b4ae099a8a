"""Bounds on almost-orthogonal directions: proved numbers, references, and that they never cross."""

import math

import mpmath
import pytest
import torch
from torch.nn import functional as F

from sae.errors import InputError
from sae.ops.capacity import (
    cosine_tail,
    greedy_lower_bound,
    log_cosine_tail,
    log_greedy_lower_bound,
    log_random_signs_lower_bound,
    log_upper_bound,
    random_signs_lower_bound,
    upper_bound,
    welch_bound,
)


def exact_tail(t, d):
    with mpmath.workdps(60):
        a, x = mpmath.mpf(d - 1) / 2, 1 - mpmath.mpf(t) ** 2
        # The integral of u^(a - 1) (1 - u)^(-1/2) over [0, x], as a series that converges for all x < 1.
        integral = x**a / a * mpmath.hyp2f1(a, 0.5, a + 1, x)
        return mpmath.log(integral / mpmath.beta(a, 0.5))


@pytest.mark.parametrize(
    ("d", "epsilon", "expected"),
    [(768, 0.1, 6.8), (768, 0.2, 2.2e3), (1600, 0.15, 8.1e3), (12_288, 0.1, 2.2e13)],
)
def test_random_signs_give_the_known_numbers(d, epsilon, expected):
    assert random_signs_lower_bound(d, epsilon) == pytest.approx(expected, rel=0.03)


def test_cosine_tail_by_hand():
    # On a circle |cos| >= t on arcs of 4 arccos t; on the sphere cos is uniform (Archimedes).
    assert cosine_tail(0.5, 2) == pytest.approx(2 / 3)
    assert cosine_tail(0.3, 3) == pytest.approx(0.7)


@pytest.mark.parametrize(
    ("t", "d"), [(0.01, 10), (0.25, 64), (0.3, 512), (0.9, 700), (0.4, 12_288), (0.999, 200)]
)
def test_cosine_tail_equals_the_exact_one_however_small(t, d):
    assert log_cosine_tail(t, d) == pytest.approx(float(exact_tail(t, d)), rel=1e-9, abs=1e-12)


def test_cosine_tail_equals_simulation():
    rows = F.normalize(torch.randn(100_000, 8), dim=1)
    assert float((rows[:, 0].abs() >= 0.4).double().mean()) == pytest.approx(cosine_tail(0.4, 8), rel=0.02)


@pytest.mark.parametrize(("d", "epsilon"), [(8, 0.2), (64, 0.1), (768, 0.03)])
def test_upper_bound_is_the_rank_bound_or_less_below_its_limit(d, epsilon):
    rank = d * (1 - epsilon**2) / (1 - d * epsilon**2)
    assert d <= upper_bound(d, epsilon) <= rank * (1 + 1e-12)


def test_upper_bound_is_reached_by_equiangular_lines():
    # The 28 lines of R^7 at 1/3, the 6 diagonals of the icosahedron at 1 / sqrt 5, a hexagon's 3 at 1/2.
    assert upper_bound(7, 1 / 3) == pytest.approx(28)
    assert upper_bound(3, 1 / math.sqrt(5)) == pytest.approx(6)
    assert upper_bound(2, 0.5) == pytest.approx(3)


def test_upper_bound_holds_where_the_rank_bound_says_nothing():
    # The 120 lines of E8's roots have |cos| 0 and 1/2 in R^8; eighth powers are the first to bound them.
    assert upper_bound(8, 0.5) == pytest.approx((1 - 2**-8) / (105 / 13_440 - 2**-8))


@pytest.mark.parametrize("d", [2, 16, 128, 768, 12_288])
@pytest.mark.parametrize("epsilon", [0.01, 0.1, 0.3, 0.6, 0.95])
def test_no_lower_bound_crosses_the_upper_one(d, epsilon):
    lower = max(math.log(d), log_random_signs_lower_bound(d, epsilon), log_greedy_lower_bound(d, epsilon))
    assert lower <= log_upper_bound(d, epsilon) + 1e-9


def test_growth_is_exp_of_c_epsilon_squared_d():
    for epsilon in (0.1, 0.2, 0.3):
        for log_bound, c in ((log_random_signs_lower_bound, 0.25), (log_greedy_lower_bound, 0.5)):
            slope = (log_bound(40_000, epsilon) - log_bound(20_000, epsilon)) / 20_000
            assert slope == pytest.approx(c * epsilon**2, rel=0.07)


def test_what_is_too_large_for_a_float_is_infinity_and_has_a_logarithm():
    assert greedy_lower_bound(100_000, 0.3) == random_signs_lower_bound(10**6, 0.5) == math.inf
    assert 4000 < log_greedy_lower_bound(100_000, 0.3) < 5000


def test_welch_bound_by_hand():
    assert welch_bound(50_257, 1600) == pytest.approx(0.0246, abs=5e-5)
    assert welch_bound(28, 7) == pytest.approx(1 / 3)
    assert welch_bound(5, 7) == welch_bound(1, 1) == 0.0


@pytest.mark.parametrize("bound", [random_signs_lower_bound, greedy_lower_bound, upper_bound])
def test_bounds_refuse_what_is_no_cosine_or_no_space(bound):
    for epsilon in (0.0, 1.0, -0.1):
        with pytest.raises(InputError, match="`epsilon` must be in"):
            bound(16, epsilon)
    with pytest.raises(InputError, match="`d` must be at least 2"):
        bound(1, 0.5)
