"""How many almost-orthogonal directions d dimensions hold: what is proved, from below and from above.

With "almost orthogonal" meaning |cos| < epsilon between any two, all grows like exp(c * epsilon² * d), never
like exp(d): at epsilon = 0.1 and d = 768 random signs prove 6.8 directions, fewer than the 768 of a basis.
The logarithms hold where the numbers themselves are too large for a float, which then come out as infinity.
"""

from __future__ import annotations

import math

import numpy as np
from scipy import special

from sae.errors import InputError

# Below this share of the sphere a cap's measure is summed up in logarithms.
_TINY = 1e-250


def random_signs_lower_bound(d: int, epsilon: float) -> float:
    """e^{epsilon² d / 4}: so many (rounded down) vectors of random signs do it with positive probability.

    By Hoeffding's inequality two vectors of d fair signs have P(|cos| >= epsilon) <= 2 e^{-epsilon² d / 2}.
    N of them make N (N - 1) / 2 pairs, so no pair is that close with positive probability as soon as
    N (N - 1) e^{-epsilon² d / 2} < 1, which N = e^{epsilon² d / 4} satisfies.
    """
    return _exp(log_random_signs_lower_bound(d, epsilon))


def log_random_signs_lower_bound(d: int, epsilon: float) -> float:
    """Natural logarithm of `random_signs_lower_bound`."""
    _check(d, epsilon)
    return epsilon**2 * d / 4


def greedy_lower_bound(d: int, epsilon: float) -> float:
    """1 / P(|cos| >= epsilon): every set that cannot be added to has at least so many vectors.

    To a set of N that cannot be added to, every unit vector has |cos| >= epsilon with some member: the N
    double caps {x: |cos(x, v)| >= epsilon} cover the sphere. Each has measure P(|cos| >= epsilon), that of
    `cosine_tail`, hence N P >= 1. P falls like (1 - epsilon²)^{(d - 1) / 2}, so this grows like
    e^{epsilon² d / 2} and more, against the quarter of random signs. A basis has d vectors, which is
    better where this is below d.

    References:
        "Probability of error for optimal codes in a Gaussian channel", Shannon 1959, and "Capabilities of
        bounded discrepancy decoding", Wyner 1965 (the argument, for single caps).
    """
    return _exp(log_greedy_lower_bound(d, epsilon))


def log_greedy_lower_bound(d: int, epsilon: float) -> float:
    """Natural logarithm of `greedy_lower_bound`."""
    _check(d, epsilon)
    return -log_cosine_tail(epsilon, d)


def upper_bound(d: int, epsilon: float) -> float:
    """No set of unit vectors with |cos| <= epsilon between any two has more members than this.

    For N unit vectors and any k >= 1, the sum of cos^{2k} over all ordered pairs, a vector with itself
    included, is the squared norm of the sum of the tensors v^{⊗2k}. By the inequality of Cauchy and Schwarz
    with the mean of these tensors over the sphere it is at least N² c_k, where c_k = E cos^{2k} =
    (2k - 1)!! / (d (d + 2) ... (d + 2k - 2)) for random directions. It is also at most
    N + N (N - 1) epsilon^{2k}, so wherever epsilon^{2k} < c_k

        N <= (1 - epsilon^{2k}) / (c_k - epsilon^{2k}).

    k = 1 is d (1 - epsilon²) / (1 - d epsilon²), the rank argument, for epsilon < 1 / sqrt(d); larger
    epsilon need larger k. The least over all k is returned.

    References:
        "Lower bounds on the maximum cross correlation of signals", Welch 1974, and "New bounds for densest
        packing of spheres in n-dimensional Euclidean space", Sidelnikov 1974 (c_k for real vectors).
        "Problems and results in extremal combinatorics I", Alon 2003 (the rank argument).
    """
    return _exp(log_upper_bound(d, epsilon))


def log_upper_bound(d: int, epsilon: float) -> float:
    """Natural logarithm of `upper_bound`."""
    _check(d, epsilon)
    orders = 64
    while True:
        k = np.arange(1, orders + 1, dtype=np.float64)
        log_c = special.gammaln(k + 0.5) - math.lgamma(0.5) + math.lgamma(d / 2) - special.gammaln(d / 2 + k)
        log_power = 2 * k * math.log(epsilon)
        valid = log_power < log_c
        # Beyond its least the bound rises, as 1 / c_k does; so a least well inside is the least of all.
        if valid.any():
            log_c, log_power = log_c[valid], log_power[valid]
            above = np.log(-np.expm1(log_power)) - log_c - np.log(-np.expm1(log_power - log_c))
            if k[valid][above.argmin()] <= orders / 2:
                return float(above.min())
        orders *= 2


def welch_bound(n: int, d: int) -> float:
    """The least coherence (max |cos|) that n unit vectors in d dimensions can have; 0 for n <= d.

    References:
        "Lower bounds on the maximum cross correlation of signals", Welch 1974.
    """
    return math.sqrt((n - d) / (d * (n - 1))) if n > d else 0.0


def cosine_tail(t: float, d: int) -> float:
    """P(|cos| >= t) for two random directions in d dimensions: I_{1 - t²}((d - 1) / 2, 1 / 2).

    cos² is Beta(1 / 2, (d - 1) / 2).
    """
    return _exp(log_cosine_tail(t, d))


def log_cosine_tail(t: float, d: int) -> float:
    """Natural logarithm of `cosine_tail`, also where that is too small for a float."""
    _check(d, t)
    a = (d - 1) / 2
    tail = special.betaincc(0.5, a, t * t)
    if tail > _TINY:
        return math.log(tail)
    # I_x(a, 1/2) = x^a sqrt(1 - x) / (a B(a, 1/2)) (1 + sum of products of x (a + 1/2 + k) / (a + 1 + k)).
    x = 1 - t * t
    k = np.arange(math.ceil(50 / (t * t)))  # the terms fall faster than (1 - t²)^k
    series = 1 + np.cumprod(x * (a + 0.5 + k) / (a + 1 + k)).sum()
    return a * math.log1p(-t * t) + math.log(t * series / a) - float(special.betaln(a, 0.5))


def _exp(logarithm: float) -> float:
    return math.exp(logarithm) if logarithm < 709 else math.inf


def _check(d: int, epsilon: float) -> None:
    if d < 2:
        raise InputError(f"`d` must be at least 2, got {d}; on a line all directions are one.")
    if not 0 < epsilon < 1:
        raise InputError(f"`epsilon` must be in (0, 1), got {epsilon}; it bounds |cos|.")
