"""Codes by gradient pursuit: greedy choice as in OMP, with a gradient step in place of the solve."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sae.ops.slots import check_k, from_slots, mixed, rows_at_once, working_copy
from sae.ops.sparse import SparseLatents

# A correlation below this many roundings of |x| counts as none.
_ROUNDINGS = 16


@torch.no_grad()
def gradient_pursuit(
    x: Float[Tensor, "rows d_model"], atoms: Float[Tensor, "n_latents d_model"], k: int
) -> SparseLatents:
    """Non-negative gradient pursuit: at most k atoms a row, with coefficients > 0.

    Each of k rounds adds the atom with the largest positive correlation with the residual, then moves all
    chosen coefficients z along the gradient g of the fit, by exact line search:

        g = A_S (x - z A_S),   a = |g|² / |g A_S|²,   z <- relu(z + a g)

    Where relu cuts, the step is the way from z to the cut point, searched again, and not beyond it: the
    error never grows. An atom once chosen is not chosen again, so that k rounds bring k atoms. One
    (rows, n_latents) product a round and no n_latents² matrix: made for dictionaries too wide for OMP.

    Args:
        x: Rows, already centred.
        atoms: Unit rows.
        k: The most atoms a row may use.

    References:
        "Gradient Pursuits", Blumensath & Davies, 2008. On the decoders of sparse autoencoders: "Replacing
        SAE Encoders with Inference-Time Optimisation", Smith, 2024 (in the progress update of the Google
        DeepMind interpretability team).
    """
    check_k(k, len(atoms))
    exact = working_copy(atoms)
    chunks = x.to(exact.dtype).split(rows_at_once(len(atoms), x.device))
    parts = [_pursue(rows, exact, k) for rows in chunks]
    values, indices = (torch.cat(side) for side in zip(*parts, strict=True))
    return from_slots(values.to(atoms.dtype), indices)


def _pursue(x: Tensor, atoms: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Coefficients and atoms of every row, (rows, k) each; slots never filled hold zero."""
    floor = _ROUNDINGS * torch.finfo(x.dtype).eps * x.norm(dim=1)
    values = x.new_zeros(len(x), k)
    chosen = torch.zeros(len(x), k, dtype=torch.int64, device=x.device)
    live = torch.arange(len(x), device=x.device)
    residual = x
    for size in range(1, k + 1):
        correlations = residual @ atoms.T
        slots = chosen[live, :size]
        gradient = correlations.gather(1, slots)
        # The last slot is still empty and says atom 0, which is free to be chosen.
        best, atom = correlations.scatter_(1, slots[:, :-1], -torch.inf).max(dim=1)
        gradient[:, -1], slots[:, -1] = best, atom
        going = best > floor[live]
        live, slots, gradient, residual = (side[going] for side in (live, slots, gradient, residual))
        if len(live) == 0:
            break
        start = values[live, :size]
        step, moved = _step(start, gradient, slots, atoms)
        chosen[live, :size], values[live, :size] = slots, (start + step).clamp_(min=0)
        residual = residual - moved
    return values, chosen


def _step(start: Tensor, gradient: Tensor, slots: Tensor, atoms: Tensor) -> tuple[Tensor, Tensor]:
    """How far the coefficients move, and what that adds to the reconstruction."""
    # A coefficient at zero whose gradient points below would only shorten the step.
    gradient = torch.where((start > 0) | (gradient > 0), gradient, 0)
    reach = _share(gradient, gradient, mixed(slots, atoms, gradient)) * gradient
    feasible = (start + reach).clamp_(min=0) - start
    moved = mixed(slots, atoms, feasible)
    share = _share(gradient, feasible, moved).clamp_(max=1)
    return share * feasible, share * moved


def _share(gradient: Tensor, way: Tensor, moved: Tensor) -> Tensor:
    """How much of a way minimises the error, (rows, 1): <gradient, way> / |way A|²."""
    squared = moved.square().sum(1, keepdim=True)
    return (gradient * way).sum(1, keepdim=True) / squared.clamp_(min=torch.finfo(moved.dtype).tiny)
