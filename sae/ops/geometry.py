"""How sets of directions lie to one another."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def mean_max_cosine(
    truth: Float[Tensor, "n_true d_model"], learned: Float[Tensor, "n_latents d_model"]
) -> float:
    """Mean over the true directions of the largest cosine with a learned one: 1 = all were found.

    Also called MMCS, from truth to learned.

    References:
        Taking features out of superposition with sparse autoencoders, Sharkey, Braun and Millidge 2022.
    """
    cosines = F.normalize(truth, dim=-1) @ F.normalize(learned, dim=-1).to(truth).T
    return float(cosines.max(dim=1).values.mean())


def coherence(directions: Float[Tensor, "n d_model"]) -> float:
    """The largest |cos| between two different rows."""
    unit = F.normalize(directions, dim=-1)
    cosines = (unit @ unit.T).abs()
    return float(cosines.fill_diagonal_(0.0).max())


def nearest_neighbour_cosines(
    directions: Float[Tensor, "n d_model"], chunk: int = 512
) -> Float[Tensor, " n"]:
    """Of each row, the largest |cos| with another row; 0 where there is no other.

    Takes `chunk` rows at a time, so that memory is chunk * n numbers and never n * n.
    """
    unit = F.normalize(directions, dim=-1)
    nearest = unit.new_zeros(len(unit))
    for begin in range(0, len(unit), chunk):
        rows = unit[begin : begin + chunk]
        cosines = (rows @ unit.T).abs()
        cosines[:, begin:].fill_diagonal_(0.0)
        nearest[begin : begin + chunk] = cosines.max(dim=1).values
    return nearest.clamp_max(1.0)


def spread_directions(
    n: int, d_model: int, max_cosine: float, generator: torch.Generator, steps: int = 2000
) -> Float[Tensor, "n d_model"]:
    """Random unit rows, pushed apart until no two have |cos| above `max_cosine`.

    Raises:
        ValueError: if they still have after `steps` pushes; the Welch bound says what is possible.
    """
    rows = F.normalize(torch.randn(n, d_model, generator=generator, dtype=torch.float64), dim=-1)
    for _ in range(steps):
        cosines = rows @ rows.T
        cosines.fill_diagonal_(0.0)
        if cosines.abs().max() <= max_cosine:
            return rows.float()
        excess = torch.sign(cosines) * (cosines.abs() - 0.98 * max_cosine).clamp_min(0.0)
        rows = F.normalize(rows - 0.5 * excess @ rows, dim=-1)
    welch = max(0.0, (n - d_model) / (d_model * (n - 1))) ** 0.5
    raise ValueError(
        f"`max_cosine`={max_cosine} was not reached by {n} rows in {d_model} dimensions after {steps} steps"
        f" (no set goes below {welch:.3f}); raise it or lower `n`."
    )
