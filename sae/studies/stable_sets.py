"""Almost-orthogonal sets among the latents that fire and that every seed finds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae.dictionaries import Dictionary
from sae.ops.almost_orthogonal import Size, sizes_by_epsilon
from sae.ops.capacity import greedy_lower_bound, random_signs_lower_bound, upper_bound
from sae.ops.stability import match_threshold, stability_scores


class StableSets(NamedTuple):
    """What is left of dictionaries that differ by their seed, and the sets in it."""

    d_model: int
    n_latents: int
    alive: list[int]
    """Latents that fire, of each seed."""
    stable: list[int]
    """Those of them that every other seed has too."""
    threshold: float
    """Cosine above which mutually nearest latents are the same."""
    sizes: list[list[Size]]
    """By seed and epsilon, beside as many random directions as are stable."""


@torch.no_grad()
def living(dictionary: Dictionary, batches: Iterable[Float[Tensor, "rows d_model"]]) -> Bool[Tensor, " n"]:
    """Which latents fire on some of the rows."""
    directions = dictionary.directions
    fires = torch.zeros(dictionary.n_latents, dtype=torch.bool, device=directions.device)
    for rows in batches:
        fires[dictionary.encode_sparse(rows.to(directions)).indices] = True
    return fires


def stable_sets(
    dictionaries: Sequence[Float[Tensor, "n d_model"]],
    alive: Sequence[Bool[Tensor, " n"]],
    epsilons: Sequence[float],
    orders: int = 20,
) -> StableSets:
    """Latents found again by all seeds, and their largest almost-orthogonal subsets found: lower bounds.

    Args:
        dictionaries: directions of each seed, of one shape.
        alive: which of them fire.
        epsilons: bounds on |cos|.
        orders: random orders in which a set is built, the largest counts.

    Raises:
        InputError: for fewer than two seeds, shapes that do not fit, or an epsilon outside (0, 1).
    """
    n, d_model = dictionaries[0].shape
    threshold = match_threshold(n, d_model)
    scores = stability_scores(dictionaries, alive, threshold)
    # A score is a count over their number: 1 only where all have it.
    stable = [rows[score >= 1] for rows, score in zip(dictionaries, scores, strict=True)]
    sizes = [sizes_by_epsilon(rows, epsilons, orders) if len(rows) else [] for rows in stable]
    counts = [int(mask.sum()) for mask in alive]
    return StableSets(d_model, n, counts, [len(rows) for rows in stable], threshold, sizes)


def table(found: StableSets) -> str:
    """In Markdown, means over seeds; beside them random directions, the bounds and a basis."""
    seeds, d = len(found.alive), found.d_model
    lines = [
        f"{found.n_latents:,} latents in {d} dimensions, {seeds} seeds: {sum(found.alive) / seeds:.1f} fire,"
        f" {sum(found.stable) / seeds:.1f} of them are found by all (cos > {found.threshold:.3f}).\n",
        "| ε | set of stable ones | of as many random | basis | random signs ≥ | greedy ≥ | at most |",
        f"|{' --- |' * 7}",
    ]
    for sizes in zip(*(of for of in found.sizes if of), strict=True):
        epsilon = sizes[0].epsilon
        means = [sum(getattr(s, key) for s in sizes) / len(sizes) for key in ("found", "random")]
        bounds = [b(d, epsilon) for b in (random_signs_lower_bound, greedy_lower_bound, upper_bound)]
        cells = [f"{epsilon:g}", *(f"{m:.1f}" for m in means), str(d), *(f"{b:.4g}" for b in bounds)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
