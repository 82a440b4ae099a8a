"""FVU against width against epsilon: what directions can write that stay almost orthogonal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from scipy import stats
from torch import Tensor

from sae.dictionaries import Dictionary, Refined
from sae.errors import InputError
from sae.ops.almost_orthogonal import largest_almost_orthogonal_subset
from sae.ops.metrics import ReconstructionMetrics
from sae.studies.planted_capacity import CONFIDENCE

BINDS = 0.5
"""A law is fitted to sets of at most this share of the living latents: there epsilon holds them down."""
FEWEST = 6
"""Sets that a law is fitted to, at least: it has two constants."""


class Subset(NamedTuple):
    """An almost-orthogonal set of a dictionary's latents, and what it leaves of the rows."""

    n_latents: int
    alive: int
    epsilon: float
    size: int
    """The largest set found: a lower bound."""
    fvu: float
    """Of rows coded with k latents of the set by a non-negative orthogonal pursuit."""
    fvu_random: float
    """The same of as many living latents drawn at random, however they lie."""


class Tradeoff(NamedTuple):
    """log FVU = -c epsilon² d_model + width log(n_latents / d_model), where epsilon binds.

    Both intervals are of least squares, Student's t; sets of one dictionary share latents, so that their
    errors are not independent and the intervals are, if anything, too narrow.
    """

    c: float
    c_low: float
    c_high: float
    width: float
    """0 where it does not matter how many latents the set was chosen from."""
    width_low: float
    width_high: float
    residual: float
    """Standard deviation of log FVU about the law."""
    n_sets: int

    def at(self, epsilon: float, n_latents: int, d_model: int) -> float:
        """FVU of a set."""
        return math.exp(-self.c * epsilon**2 * d_model) * (n_latents / d_model) ** self.width


@torch.no_grad()
def subsets(
    dictionary: Dictionary,
    alive: Bool[Tensor, " n"],
    epsilons: Sequence[float],
    k: int,
    batches: Callable[[], Iterable[Tensor]],
    mean: Tensor,
    orders: int = 20,
) -> list[Subset]:
    """The largest set found at each epsilon, and as many latents at random, coded on the same rows.

    Args:
        dictionary: a trained one; its encoder is not used.
        alive: which latents fire, of which sets are made.
        epsilons: bounds on |cos|.
        k: latents a row, or all of a smaller set.
        batches: begins one pass over the rows.
        mean: of the training rows.
        orders: random orders in which a set is built, the largest counts.
    """
    latents = alive.nonzero().squeeze(1)
    generator = torch.Generator().manual_seed(0)
    found = []
    for epsilon in epsilons:
        directions = dictionary.directions[latents].float()
        chosen = largest_almost_orthogonal_subset(directions, epsilon, orders).to(latents.device)
        drawn = torch.randperm(len(latents), generator=generator)[: len(chosen)].to(latents.device)
        fvu, fvu_random = (_fvu(dictionary, latents[s], k, batches, mean) for s in (chosen, drawn))
        found.append(Subset(dictionary.n_latents, len(latents), epsilon, len(chosen), fvu, fvu_random))
    return found


def _fvu(
    dictionary: Dictionary,
    latents: Int[Tensor, " some"],
    k: int,
    batches: Callable[[], Iterable[Tensor]],
    mean: Tensor,
) -> float:
    some = Refined(dictionary.d_model, len(latents), min(k, len(latents)), "omp")
    some = some.to(dictionary.directions.device)
    whole = Refined.of(dictionary, "omp", k)
    some.W_dec.copy_(whole.W_dec[latents])
    some.b_dec.copy_(whole.b_dec)
    metrics = ReconstructionMetrics(len(latents), mean.to(some.device))
    for rows in batches():
        x = rows.to(some.device, torch.float32)
        code = some.encode_sparse(x)
        metrics.add(x, some.decode_sparse(code), code, None)
    return metrics.compute().fvu


def fit_tradeoff(sets: Iterable[Subset], d_model: int) -> Tradeoff:
    """Least squares of log FVU over the sets that epsilon holds down.

    Raises:
        InputError: for fewer than `FEWEST` such sets, or of one width alone.
    """
    bound = [one for one in sets if one.size <= BINDS * one.alive]
    if len(bound) < FEWEST or len({one.n_latents for one in bound}) < 2:
        raise InputError(
            f"a law of FVU against epsilon needs {FEWEST} sets or more, of two widths or more, that hold at"
            f" most {BINDS:.0%} of the living latents; got {len(bound)}: ask for smaller epsilons."
        )
    x = np.array([[-(one.epsilon**2) * d_model, math.log(one.n_latents / d_model)] for one in bound])
    y = np.log([one.fvu for one in bound])
    (c, width), *_ = np.linalg.lstsq(x, y, rcond=None)
    free = len(y) - 2
    residual = float(np.linalg.norm(y - x @ (c, width))) / math.sqrt(free)
    spread = residual * np.sqrt(np.diag(np.linalg.inv(x.T @ x)))
    half_c, half_width = stats.t.ppf((1 + CONFIDENCE) / 2, free) * spread
    return Tradeoff(
        *map(float, (c, c - half_c, c + half_c, width, width - half_width, width + half_width)),
        residual=residual,
        n_sets=len(y),
    )


def law_of(sets: Sequence[Subset], d_model: int) -> Tradeoff | str:
    """The law, or why there is none."""
    try:
        return fit_tradeoff(sets, d_model)
    except InputError as error:
        return str(error)


def table(sets: Sequence[Subset], d_model: int) -> str:
    """In Markdown, a line a width and a column an epsilon; below it the law, where one can be fitted."""
    epsilons = sorted({one.epsilon for one in sets})
    titles = ["n_latents", *(f"ε = {epsilon:g}" for epsilon in epsilons)]
    lines = [f"| {' | '.join(titles)} |", f"|{' --- |' * len(titles)}"]
    for n in sorted({one.n_latents for one in sets}):
        of = {one.epsilon: one for one in sets if one.n_latents == n}
        cells = [f"{n:,}", *(f"{of[e].fvu:.3f} ({of[e].fvu_random:.3f})" for e in epsilons)]
        lines.append(f"| {' | '.join(cells)} |")
    lines.append("\nFVU of rows coded with the set alone; in brackets with as many latents at random.")
    law = law_of(sets, d_model)
    if isinstance(law, str):
        return "\n".join([*lines, f"No law: {law}"])
    return "\n".join([
        *lines,
        f"FVU = exp(-c ε² d_model) (n / d_model)^w over {law.n_sets} sets of at most half of the latents:"
        f" c = {law.c:.3f} (90 %: {law.c_low:.3f} to {law.c_high:.3f}),",
        f"w = {law.width:.3f} ({law.width_low:.3f} to {law.width_high:.3f}); log FVU is off it by"
        f" {law.residual:.3f}.",
    ])  # fmt: skip
