"""How many there are of what was caught a few times: estimators of capture and recapture.

Every one of them takes f_1 ... f_S, the number of features caught in exactly 1 ... S of S occasions (here:
seeds). All are biased in two known ways. A feature that is hard to catch (rare, faint) adds more to the truth
than to the estimate: too low; with features that no seed can catch there is no remedy. A latent that is no
feature is caught once, by chance, and looks like such a feature: too high, without bound. So what was caught
once is to be looked at first; `expected_singletons` says how many of them the rest leads to expect.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Int
from scipy.special import ndtri
from torch import Tensor

from sae.errors import InputError

LEVEL = 0.9
"""Of an interval, unless told otherwise."""


class Estimate(NamedTuple):
    """A number of features, with an interval."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.0f} ({self.low:.0f} to {self.high:.0f})"


def lincoln_petersen(n_a: int, n_b: int, both: int) -> float:
    """N = n_a n_b / both, of two occasions; infinite where nothing was caught twice.

    Right where every feature is equally easy to catch and occasions are independent; too low otherwise.

    References:
        The number of fish as told by marks: Petersen 1896; of ducks by rings: Lincoln 1930.
    """
    _check_pair(n_a, n_b, both)
    return n_a * n_b / both if both else math.inf


def chapman(n_a: int, n_b: int, both: int, level: float = LEVEL) -> Estimate:
    """(n_a + 1)(n_b + 1) / (both + 1) - 1: Lincoln and Petersen's without most of its bias in small numbers.

    References:
        Some properties of the hypergeometric distribution with applications to zoological sample censuses,
        Chapman 1951. The variance: The effects of trap response on tag recapture estimates, Seber 1970.
    """
    _check_pair(n_a, n_b, both)
    value = (n_a + 1) * (n_b + 1) / (both + 1) - 1
    variance = (n_a + 1) * (n_b + 1) * (n_a - both) * (n_b - both) / ((both + 1) ** 2 * (both + 2))
    return _log_interval(value, n_a + n_b - both, variance, level)


def chao(frequencies: Int[Tensor, " seeds"], level: float = LEVEL) -> Estimate:
    """D + (S - 1) / S * f_1 (f_1 - 1) / (2 (f_2 + 1)): a lower bound, whatever the chances of capture are.

    The bound is met where all not yet caught have the chance of those caught once; else it is too low.

    References:
        Estimating the population size for capture-recapture data with unequal catchability, Chao 1987: the
        bound, and the interval from the logarithm of what is missing. Species estimation and applications,
        Chao 2005: this form of it, and its variance.
    """
    f, caught = _checked(frequencies)
    share = (len(f) - 1) / len(f)
    f1, f2 = f[0], f[1]
    value = caught + share * f1 * (f1 - 1) / (2 * (f2 + 1))
    variance = share * f1 * (f1 - 1) / (2 * (f2 + 1))
    variance += share**2 * f1 * (2 * f1 - 1) ** 2 / (4 * (f2 + 1) ** 2)
    variance += share**2 * f1**2 * f2 * (f1 - 1) ** 2 / (4 * (f2 + 1) ** 4)
    if f2 == 0 and f1 > 0:
        variance -= share**2 * f1**4 / (4 * value)
    return _log_interval(value, caught, max(variance, 0.0), level)


def chao_lee(frequencies: Int[Tensor, " seeds"]) -> float:
    """D / C + f_1 / C * g²: the coverage C = 1 - f_1 / sum i f_i, and g the variation of the chances.

    More than the bound of `chao` where the chances vary much; then also less certain, and still too low where
    most features are nearly never caught. Infinite where everything was caught once.

    References:
        Estimating population size for capture-recapture data when capture probabilities vary by time and
        individual animal, Chao, Lee and Jeng 1992; Estimating the number of classes via sample coverage,
        Chao and Lee 1992.
    """
    f, caught = _checked(frequencies)
    total = sum(i * count for i, count in enumerate(f, start=1))
    if total == 0:
        return 0.0
    coverage = 1 - f[0] / total
    if coverage == 0:
        return math.inf
    pairs = sum(i * (i - 1) * count for i, count in enumerate(f, start=1))
    variation = caught / coverage * len(f) * pairs / ((len(f) - 1) * total**2) - 1
    return caught / coverage + f[0] / coverage * max(variation, 0.0)


def jackknife(frequencies: Int[Tensor, " seeds"], order: int = 1, level: float = LEVEL) -> Estimate:
    """D + (S - 1) / S f_1, or of second order D + (2S - 3) / S f_1 - (S - 2)² / (S (S - 1)) f_2.

    What removes the bias of order 1 / S (and 1 / S²) of counting what was caught. Close where most were
    caught; too low with few occasions and many features that are hard to catch.

    References:
        Estimation of the size of a closed population when capture probabilities vary among animals, Burnham
        and Overton 1978; the variance is sum a_i² f_i - N for N = sum a_i f_i.
    """
    f, caught = _checked(frequencies)
    s = len(f)
    if order == 1:
        weights = [1 + (s - 1) / s]
    elif order == 2:
        weights = [1 + (2 * s - 3) / s, 1 - (s - 2) ** 2 / (s * (s - 1))]
    else:
        raise InputError(f"`order` must be 1 or 2, got {order}.")
    weights += [1.0] * (s - len(weights))
    value = sum(a * count for a, count in zip(weights, f, strict=True))
    variance = sum(a * a * count for a, count in zip(weights, f, strict=True)) - value
    return _log_interval(max(value, caught), caught, max(variance, 0.0), level)


def expected_singletons(frequencies: Int[Tensor, " seeds"]) -> float:
    """How many features should have been caught once, judged by those caught twice and more; at most f_1.

    f_1 = 4 f_2² / (3 f_3) - f_2 f_3 / (2 f_4), as far as f_2, f_3 and f_4 say it. What lies above it was
    caught once because it is nothing. With three seeds the second term falls away; two say nothing.

    References:
        Estimating and comparing microbial diversity in the presence of sequencing errors, Chiu and Chao 2016.
        There for abundances; f_i means the same here, and chances of capture are to be small.
    """
    f, _ = _checked(frequencies)
    if len(f) < 3:
        raise InputError(f"`frequencies` must be of at least 3 seeds to judge singletons, got {len(f)}.")
    f1, f2, f3 = f[:3]
    f4 = f[3] if len(f) > 3 else 0
    expected = 4 * f2**2 / (3 * max(f3, 1)) - (f2 * f3 / (2 * f4) if f4 else 0.0)
    return min(float(f1), max(expected, 0.0))


def level_singletons(frequencies: Int[Tensor, " seeds"]) -> float:
    """As many caught once as, on average, were caught 2 to S - 1 times; at most f_1.

    Where the chances of capture are spread evenly over (0, 1), every number of captures is equally frequent:
    the binomial averaged over a uniform chance. Features that are all but always caught add to f_S alone. So
    the numbers between tell f_1, with no use of f_1 itself, and of three or more occasions. If most features
    are hard to catch, more than that were caught once: too low.

    References:
        The uniform prior: Bayes 1763. Compare `expected_singletons`, for small chances.
    """
    f, _ = _checked(frequencies)
    if len(f) < 3:
        raise InputError(f"`frequencies` must be of at least 3 seeds to judge singletons, got {len(f)}.")
    return min(float(f[0]), sum(f[1:-1]) / (len(f) - 2))


def bootstrap_interval(
    estimator: Callable[[Int[Tensor, " seeds"]], float],
    frequencies: Int[Tensor, " seeds"],
    level: float = LEVEL,
    draws: int = 1000,
    seed: int = 0,
) -> Estimate:
    """An interval by drawing features anew: N of them, from those caught and those estimated to be missing.

    The spread of the draws, laid about the estimate; it knows the chance of capture and nothing of bias.

    References:
        Bootstrap methods: another look at the jackknife, Efron 1979; Buckland and Garthwaite 1991 for capture
        and recapture, with the missing ones among what is drawn.
    """
    f, caught = _checked(frequencies)
    value = float(estimator(frequencies))
    if not math.isfinite(value) or value < caught:
        raise InputError(f"`estimator` must give a finite number of at least {caught}, got {value}.")
    total = max(round(value), caught)
    if total == 0:
        return Estimate(value, 0.0, 0.0)
    generator = torch.Generator().manual_seed(seed)
    kinds = torch.tensor([total - caught, *f], dtype=torch.float64)
    drawn = torch.multinomial(kinds, draws * total, replacement=True, generator=generator).view(draws, total)
    found = []
    for kind in drawn:
        found.append(float(estimator(torch.bincount(kind, minlength=len(f) + 1)[1:])))
    tail = (1 - level) / 2
    ends = torch.tensor(found, dtype=torch.float64).quantile(torch.tensor([tail, 1 - tail]).double())
    low, high = (float(end) for end in ends)
    return Estimate(value, min(max(low, caught), value), max(high, value))


def _checked(frequencies: Tensor) -> tuple[list[int], int]:
    """f_1 ... f_S as numbers, and their sum."""
    f = [int(count) for count in frequencies]
    if len(f) < 2 or min(f) < 0:
        raise InputError(f"`frequencies` must be counts for at least 2 seeds, none below 0, got {f}.")
    return f, sum(f)


def _check_pair(n_a: int, n_b: int, both: int) -> None:
    if not 0 <= both <= min(n_a, n_b):
        raise InputError(f"`both` must be in [0, min(n_a, n_b)={min(n_a, n_b)}], got {both}.")


def _log_interval(value: float, caught: int, variance: float, level: float) -> Estimate:
    """The interval of Chao 1987: log(N - D) is taken for normal, so no end lies below what was caught."""
    if not 0 < level < 1:
        raise InputError(f"`level` must be in (0, 1), got {level}.")
    missing = value - caught
    if missing <= 0:
        return Estimate(value, float(caught), float(caught))
    spread = math.exp(float(ndtri((1 + level) / 2)) * math.sqrt(math.log1p(variance / missing**2)))
    return Estimate(value, caught + missing / spread, caught + missing * spread)
