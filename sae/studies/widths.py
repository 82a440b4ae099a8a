"""FVU against width against epsilon: what more directions buy, and how far apart they can stay."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy import optimize, stats

from sae.errors import InputError
from sae.studies.planted_capacity import CONFIDENCE
from sae.training.names import metrics_of_each

FEWEST = 4
"""Widths that a law is fitted to, at least: it has three constants."""
# Floors, as shares of the least FVU, from which the fit begins: the best end counts.
_STARTS = (0.0, 0.3, 0.6, 0.9)


class Width(NamedTuple):
    """A dictionary of a run, with the almost-orthogonal sets among its living latents."""

    name: str
    n_latents: int
    alive: int
    d_model: int
    fvu: float
    l0: float
    found: dict[float, int]
    """By epsilon: the largest set found, a lower bound."""
    random: dict[float, int]
    """The same among as many random directions."""


class Law(NamedTuple):
    """FVU = floor + scale n^-exponent: what more latents of the same L0 and training buy, and leave.

    References:
        Scaling and evaluating sparse autoencoders, Gao et al. 2024, arXiv 2406.04093 (an irreducible part).
    """

    floor: float
    scale: float
    exponent: float
    low: float
    high: float
    """Ends of the `CONFIDENCE` interval of the exponent: Student's t, from the fit's linearisation."""
    residual: float
    """Standard deviation of log FVU about the law."""
    straight_residual: float
    """The same about the best law without a floor."""

    def at(self, n: int | float) -> float:
        """FVU of a width."""
        return self.floor + self.scale * n**-self.exponent


def widths_of(metrics: dict[str, Any]) -> list[Width]:
    """The dictionaries of a run, from its metrics.json, by width, which is all that they should differ in.

    Raises:
        InputError: if it has too few, or did not measure their geometry.
    """
    several = metrics_of_each(metrics)
    if len(several) < FEWEST or any(own.get("geometry") is None for own in several.values()):
        raise InputError(
            f"the run must have {FEWEST} or more dictionaries and their geometry, as in configs/widths.yaml:"
            " list them under `model.dictionaries`, and DirectionGeometry among the callbacks."
        )
    found = []
    for name, own in several.items():
        rows = own["geometry"]["almost_orthogonal"]
        sizes = [{row["epsilon"]: row[key] for row in rows} for key in ("found", "random")]
        alive = own["geometry"]["sets"]["sae"]["n"]
        found.append(Width(name, own["n_latents"], alive, metrics["d_model"], own["fvu"], own["l0"], *sizes))
    return sorted(found, key=lambda width: width.n_latents)


def law_of(widths: list[Width]) -> Law:
    """The law over the widths of a run."""
    return fit_law([width.n_latents for width in widths], [width.fvu for width in widths])


def fit_law(n: Sequence[int], fvu: Sequence[float]) -> Law:
    """Least squares of log FVU, as errors of FVU grow with it.

    Raises:
        InputError: for fewer than `FEWEST` different widths, or an FVU that is not positive.
    """
    if len(n) != len(fvu) or len(set(n)) < FEWEST:
        raise InputError(f"a law needs {FEWEST} different widths or more, got {len(set(n))}.")
    x, y = np.log(np.asarray(n, dtype=np.float64)), np.asarray(fvu, dtype=np.float64)
    if not (np.isfinite(y) & (y > 0)).all():
        raise InputError(f"`fvu` must be finite and positive, got {y.tolist()}.")
    line = stats.linregress(x, np.log(y))
    straight = np.log(y) - line.intercept - line.slope * x

    def left(constants: np.ndarray) -> np.ndarray:
        floor, log_scale, exponent = constants
        return np.log(y) - np.log(floor + np.exp(log_scale - exponent * x))

    bounds = [0.0, -np.inf, -np.inf], [float(y.min()), np.inf, np.inf]
    fits = []
    for share in _STARTS:
        above = stats.linregress(x, np.log(y - share * y.min()))
        begin = [share * y.min(), above.intercept, -above.slope]
        fits.append(optimize.least_squares(left, begin, bounds=bounds, x_scale="jac", xtol=1e-12))
    best = min(fits, key=lambda fit: fit.cost)
    free = len(x) - 3
    variance = 2 * best.cost / free
    spread = math.sqrt(variance * np.linalg.pinv(best.jac.T @ best.jac)[2, 2])
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, free)) * spread
    floor, log_scale, exponent = map(float, best.x)
    return Law(
        floor,
        math.exp(log_scale),
        exponent,
        exponent - half,
        exponent + half,
        math.sqrt(variance),
        math.sqrt(float(straight @ straight) / (len(x) - 2)),
    )


def table(widths: list[Width]) -> str:
    """The widths in Markdown: at each epsilon the set found, and that among as many random directions."""
    epsilons = list(widths[0].found)
    titles = ["n_latents", "n / d_model", "alive", "FVU", *(f"ε = {epsilon:g}" for epsilon in epsilons)]
    lines = [f"| {' | '.join(titles)} |", f"|{' --- |' * len(titles)}"]
    for width in widths:
        cells = [f"{width.n_latents:,}", f"{width.n_latents / width.d_model:g}", f"{width.alive:,}"]
        cells += [f"{width.fvu:.4f}"]
        cells += [f"{width.found[epsilon]:,} ({width.random[epsilon]:,})" for epsilon in epsilons]
        lines.append(f"| {' | '.join(cells)} |")
    law = law_of(widths)
    return "\n".join(lines) + (
        f"\n\nIn brackets: among as many random directions. A basis has d_model = {widths[0].d_model}.\n"
        f"FVU = {law.floor:.3g} + {law.scale:.3g} n^-{law.exponent:.3f}, 90 % interval of the exponent"
        f" {law.low:.3f} to {law.high:.3f};\nlog FVU is off it by {law.residual:.3f}, and off a law without"
        f" a floor by {law.straight_residual:.3f}."
    )
