"""Planted almost-orthogonal directions: how many fit into d dimensions, and how many are found again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from scipy import stats
from torch import Tensor
from torch.nn import functional as F

from sae.errors import InputError
from sae.ops.almost_orthogonal import Packing
from sae.ops.capacity import log_greedy_lower_bound
from sae.ops.moments import StreamingMoments
from sae.ops.sparse import SparseLatents, sparse_decode
from sae.ops.truth import RECOVERED

DIMENSIONS = (64, 96, 128, 192, 256, 384, 512)
CONFIDENCE = 0.9
"""Of all intervals."""
_BLOCK = 1024
_STEPS, _ROWS_A_STEP = 3000, 1024  # of a short training

Numbers = Sequence[int | float] | np.ndarray
Learn = Callable[[Tensor, int, int], Tensor]
"""learn(rows, n, k) -> (n, d) directions, for rows that are sums of some k of n unknown ones."""


class Packed(NamedTuple):
    """Almost-orthogonal directions out of random ones."""

    directions: Float[Tensor, "n d"]
    is_full: bool
    """Whether the patience ended it, not the cap: more are hard to find."""


class Point(NamedTuple):
    """One d of a sweep."""

    d: int
    found: int
    """Directions packed: a lower bound of what there is."""
    is_full: bool
    """As in `Packed`: only then does `found` say anything about d."""
    planted: int
    """Of these, the ones that rows were made of; 0 = nobody was asked to learn."""
    recovered: int
    """Of the planted ones, those that a learned direction matches: |cos| > `RECOVERED`."""


class Line(NamedTuple):
    """y = intercept + slope x by least squares."""

    intercept: float
    slope: float
    low: float
    high: float
    """Ends of the `CONFIDENCE` interval of the slope: Student's t with points - 2 degrees of freedom."""
    residual: float  # standard deviation of y about the line, likewise


class Fit(NamedTuple):
    """log count = intercept + slope d, with slope = c epsilon²; and what else the counts could follow."""

    intercept: float
    slope: float
    low: float
    high: float
    """Ends of the `CONFIDENCE` interval of the slope."""
    c: float
    c_low: float
    c_high: float
    c_greedy: float
    """The same slope of the proved `greedy_lower_bound` over the same d: more than 1/2, as d is finite."""
    residual: float
    """Standard deviation of log count about this line."""
    linear_residual: float
    """About log count = log d + constant, which is count ∝ d; it has one parameter less."""


def greedy_packing(
    d: int,
    epsilon: float,
    generator: torch.Generator,
    patience: int = 1000,
    cap: int = 20_000,
    device: torch.device | None = None,
) -> Packed:
    """Draws random directions and keeps each that has |cos| < epsilon with all kept so far.

    Ends after `patience` rejections in a row, or with `cap` directions. If conflicts were independent, a
    draw would pass m kept ones with probability e^{-m P}, P = P(|cos| >= epsilon): patience T thus ends at
    about log(T) / P, which is log(T) times `greedy_lower_bound` and grows with d as that does.

    Args:
        d: Dimensions.
        epsilon: Bound on |cos|.
        generator: On the CPU.
        patience: Rejections in a row that end it.
        cap: The most to keep; time grows with its square.
        device: That compares them.
    """
    if patience < 1 or cap < 1:
        raise InputError(f"`patience` and `cap` must be at least 1, got {patience} and {cap}.")
    packing = Packing(d, epsilon, device)
    rejected = 0
    while True:
        unit = F.normalize(torch.randn(_BLOCK, d, generator=generator), dim=1).to(device)
        before = len(packing)
        kept = packing.offer(unit).cpu()
        # Rejections before each one kept, the first of them going on from the block before.
        runs = torch.cat([kept[:1] + rejected, kept.diff() - 1])
        in_time = int((runs < patience).cumprod(0).sum())
        if before + in_time >= cap:
            return Packed(packing.rows[:cap], is_full=False)
        if in_time < len(kept):
            return Packed(packing.rows[: before + in_time], is_full=True)
        rejected = _BLOCK - 1 - int(kept[-1]) if len(kept) else rejected + _BLOCK
        if rejected >= patience:
            return Packed(packing.rows, is_full=True)


def sparse_mixtures(
    directions: Float[Tensor, "n d"], n_rows: int, k: int, generator: torch.Generator
) -> Float[Tensor, "rows d"]:
    """Sums of directions that fire by themselves, k of them in the mean, magnitudes uniform in [0.5, 1.5].

    The number that fire varies from row to row. Were it the same in all, every direction could take the same
    step aside and an offset take it back, and directions would hardly be told by their rows.
    """
    n = len(directions)
    if not 1 <= k <= n:
        raise InputError(f"`k` must be in [1, n={n}], got k={k}.")
    parts = []
    for rows in torch.arange(n_rows).split(max(1, 2**22 // n)):
        fires = torch.rand(len(rows), n, generator=generator) * n < k
        magnitudes = 0.5 + torch.rand(int(fires.sum()), generator=generator)
        offsets = F.pad(fires.sum(1).cumsum(0), (1, 0))
        code = SparseLatents(magnitudes, fires.nonzero()[:, 1], offsets).to(directions.device)
        parts.append(sparse_decode(code, directions))
    return torch.cat(parts)


def dictionary_learning(rows: Float[Tensor, "rows d"], n: int, k: int) -> Float[Tensor, "n d"]:
    """The atoms that `sae.baselines.DictionaryLearning` finds."""
    from sae.baselines import DictionaryLearning  # packing and fits do without

    moments = StreamingMoments()
    moments.add(rows)
    learned = DictionaryLearning(rows.shape[1], n, k, passes=30).to(rows.device)
    return learned.fit([rows], moments.moments()).directions


def autoencoder(rows: Float[Tensor, "rows d"], n: int, k: int) -> Float[Tensor, "n d"]:
    """The directions of a `BatchTopK` autoencoder, whose L0 may vary by row, after a short training."""
    from sae.dictionaries import BatchTopK
    from sae.studies.l0_search import train

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = BatchTopK(rows.shape[1], n, float(k)).to(rows.device)
        return train(made, rows, _STEPS, _ROWS_A_STEP).directions


LEARNERS: dict[str, Learn] = {"dictionary_learning": dictionary_learning, "sae": autoencoder}
"""By the names that the script takes."""


def recovered(planted: Float[Tensor, "n d"], learned: Float[Tensor, "m d"]) -> int:
    """How many planted directions have |cos| > `RECOVERED` with a learned one.

    Where the planted ones are almost orthogonal, below 2 * RECOVERED² - 1 = 0.62, no learned direction can
    stand for two of them, so this needs no assignment.
    """
    learned = F.normalize(learned.to(planted), dim=1).T
    return sum(int(((rows @ learned).abs().amax(1) > RECOVERED).sum()) for rows in planted.split(_BLOCK))


def planted_sweep(
    dimensions: Sequence[int] = DIMENSIONS,
    epsilon: float = 0.25,
    seed: int = 0,
    patience: int = 1000,
    cap: int = 20_000,
    learn: Learn | None = None,
    k: int = 4,
    most_planted: int = 4096,
    rows_each: int = 100,
    device: torch.device | None = None,
) -> Iterator[Point]:
    """Packs directions at every d and, where told how to learn, plants some and learns them back.

    Args:
        dimensions: One point each, as it is done.
        epsilon: Bound on |cos|.
        seed: Of everything; each d has its own stream.
        patience, cap: As in `greedy_packing`.
        learn: One of `LEARNERS`, or another; None = only pack.
        k: Directions in a row, in the mean.
        most_planted: The most directions that rows are made of: the first ones packed. Where it cuts, what
            is recovered says nothing of d.
        rows_each: Rows for each planted direction; each is in k times as many.
        device: That computes.
    """
    if learn is not None and epsilon >= 2 * RECOVERED**2 - 1:
        raise InputError(f"`epsilon` must be below {2 * RECOVERED**2 - 1:.2f} to learn, got {epsilon}.")
    for d in dimensions:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + d)
        packed = greedy_packing(d, epsilon, generator, patience, cap, device)
        point = Point(d, len(packed.directions), packed.is_full, 0, 0)
        if learn is not None:
            planted = packed.directions[:most_planted]
            rows = sparse_mixtures(planted, rows_each * len(planted), k, generator)
            found = recovered(planted, learn(rows, len(planted), k))
            point = point._replace(planted=len(planted), recovered=found)
        yield point


def fit_exponential(d: Sequence[int], counts: Numbers, epsilon: float) -> Fit:
    """Fits log count = intercept + c epsilon² d; give only counts that no cap has cut."""
    x, y = _positive("d", d), np.log(_positive("counts", counts))
    line = fit_line(x, y)
    greedy = fit_line(x, [log_greedy_lower_bound(one, epsilon) for one in d])
    scale = epsilon**2
    return Fit(
        *line[:4],
        *(value / scale for value in (line.slope, line.low, line.high, greedy.slope)),
        residual=line.residual,
        linear_residual=float((y - np.log(x)).std(ddof=1)),
    )


def fit_line(x: Numbers, y: Numbers) -> Line:
    """Least squares with Student's interval: right where deviations are normal and of one size."""
    if len(x) != len(y) or len(set(x)) < 3:
        raise InputError(f"a line needs 3 different points or more, got {len(set(x))} x and {len(y)} y.")
    found = stats.linregress(x, y)
    free = len(x) - 2
    half = stats.t.ppf((1 + CONFIDENCE) / 2, free) * found.stderr
    rest = np.asarray(y) - found.intercept - found.slope * np.asarray(x)
    ends = found.slope - half, found.slope + half
    return Line(*map(float, (found.intercept, found.slope, *ends, math.sqrt(rest @ rest / free))))


def _positive(name: str, values: Numbers) -> np.ndarray:
    array = np.asarray(values, dtype=np.float64)
    if not (np.isfinite(array) & (array > 0)).all():
        raise InputError(f"`{name}` must be finite and positive, got {array.tolist()}.")
    return array
