"""Codes by FISTA: the non-negative lasso on given atoms, and the penalty that brings a wanted L0."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sae.errors import InputError
from sae.ops.slots import rows_at_once, working_copy
from sae.ops.sparse import SparseLatents, from_dense, joined

# Steps between two looks at the stopping rule; on an accelerator every look waits for the device.
_CHECK_EVERY = 10
# The bound on the curvature is above it by at most width^(2^-8): 2.6 % for 768 columns.
_SQUARINGS = 7
# Penalties are searched between the largest correlation, which gives L0 = 0, and this share of it.
_LEAST_SHARE = 1e-5
_SEARCH_ROUNDS = 30


@torch.no_grad()
def fista(
    x: Float[Tensor, "rows d_model"],
    atoms: Float[Tensor, "n_latents d_model"],
    penalty: float,
    steps: int = 500,
    tolerance: float = 1e-5,
    refit: bool = False,
) -> SparseLatents:
    """For every row the z >= 0 with the least ½ |x - z atoms|² + penalty * sum(z).

    A step goes 1/L along the gradient from a point ahead, lowers by penalty/L and cuts at zero; the
    momentum of a row restarts whenever a step goes against it. Two (rows, n_latents) x d_model products
    a step. L bounds the largest eigenvalue of atomsᵀ atoms from above, so no step overshoots.

    Args:
        x: Rows, already centred.
        atoms: Unit rows.
        penalty: Price of one unit of latent, in the units of x.
        steps: The most steps taken.
        tolerance: A row is solved when a step moves no latent by more than this share of its largest.
        refit: Follow with non-negative least squares on the latents found, which undoes the penalty's
            shrinkage; it may take latents to zero, never bring new ones.

    References:
        "A Fast Iterative Shrinkage-Thresholding Algorithm for Linear Inverse Problems", Beck & Teboulle,
        2009. "Adaptive Restart for Accelerated Gradient Schemes", O'Donoghue & Candès, 2012,
        arXiv:1204.3982 (here each row restarts by itself).
    """
    if not penalty >= 0:
        raise InputError(f"`penalty` must be at least 0, got penalty={penalty:g}.")
    if steps < 1:
        raise InputError(f"`steps` must be at least 1, got steps={steps}.")
    exact = working_copy(atoms)
    curvature = _curvature_bound(exact)
    parts = []
    for rows in x.to(exact.dtype).split(rows_at_once(len(atoms), x.device)):
        start = rows.new_zeros(len(rows), len(exact))
        codes = _solve(rows, exact, penalty, curvature, start, None, steps, tolerance)
        if refit:
            codes = _solve(rows, exact, 0.0, curvature, codes, codes > 0, steps, tolerance)
        parts.append(from_dense(codes.to(atoms.dtype)))
    return joined(parts)


def fista_penalty_for_l0(
    x: Float[Tensor, "rows d_model"],
    atoms: Float[Tensor, "n_latents d_model"],
    l0: float,
    steps: int = 500,
    tolerance: float = 1e-5,
) -> float:
    """The penalty at which `fista` uses `l0` latents a row on average, to 1 %, by bisection.

    Args:
        x: A sample of rows, already centred; a thousand are plenty.
        atoms: Unit rows.
        l0: Latents per row wanted, on average.
        steps: As for `fista`.
        tolerance: As for `fista`.

    Raises:
        InputError: if no penalty brings that L0 on these rows.
    """
    exact = working_copy(atoms)
    highest = float((x.to(exact.dtype) @ exact.T).max()) if len(x) else 0.0
    if not l0 > 0 or not highest > 0:
        raise InputError(f"`l0` must be above 0, and a row must lie along an atom; got l0={l0:g}.")
    low, high = _LEAST_SHARE * highest, highest
    penalty = found = 0.0
    for _ in range(_SEARCH_ROUNDS):
        penalty = (low * high) ** 0.5
        found = len(fista(x, atoms, penalty, steps, tolerance).values) / len(x)
        if abs(found - l0) <= 0.01 * l0:
            return penalty
        low, high = (penalty, high) if found > l0 else (low, penalty)
        if high < 1.001 * low:
            break
    # A few rows cannot hit every mean: one latent of one row may be more than 1 %.
    if abs(found - l0) <= max(0.05 * l0, 2 / len(x)):
        return penalty
    raise InputError(
        f"`l0` must be one that the lasso reaches on these rows, got l0={l0:g} where it ends at {found:.3g}; "
        "lower l0 or raise steps."
    )


def _solve(
    x: Tensor,
    atoms: Tensor,
    penalty: float,
    curvature: float,
    start: Tensor,
    allowed: Tensor | None,
    steps: int,
    tolerance: float,
) -> Tensor:
    """The fixed point z = relu(z + ((x - z atoms) atomsᵀ - penalty) / curvature), on the allowed latents."""
    solved = start.clone()
    live = torch.arange(len(x), device=x.device)
    codes, ahead, momentum = start, start, x.new_ones(len(x), 1)
    for step in range(1, steps + 1):
        residual = torch.addmm(x, ahead, atoms, alpha=-1)
        previous, codes = codes, torch.addmm(ahead, residual, atoms.T, alpha=1 / curvature)
        codes.sub_(penalty / curvature).clamp_(min=0)
        if allowed is not None:
            codes.mul_(allowed)
        moved = codes - previous
        against = torch.linalg.vecdot(ahead - codes, moved)[:, None] > 0
        momentum = torch.where(against, 1, momentum)
        following = (1 + (1 + 4 * momentum.square()).sqrt()) / 2
        ahead = torch.addcmul(codes, (momentum - 1) / following, moved)
        momentum = following
        if step % _CHECK_EVERY == 0 or step == steps:
            solved[live] = codes
            going = moved.abs().amax(1) > tolerance * codes.amax(1)
            live, x, codes, ahead, momentum = (side[going] for side in (live, x, codes, ahead, momentum))
            allowed = None if allowed is None else allowed[going]
            if len(live) == 0:
                break
    return solved


def _curvature_bound(atoms: Tensor) -> float:
    """A bound from above on the largest eigenvalue of atomsᵀ atoms, tight to a few per cent.

    Power iteration on the matrix itself: M <- M², and |M^m|^(1/m) in Frobenius norm is never below the
    largest eigenvalue, where a vector's iteration only comes near from below.
    """
    matrix = atoms.double()
    matrix = matrix.T @ matrix if len(matrix) > matrix.shape[1] else matrix @ matrix.T
    bound, power = 0.0, 1
    for _ in range(_SQUARINGS + 1):
        norm = matrix.norm().clamp(min=1e-300)
        bound += float(norm.log()) / power  # log of the norm taken out so far, as a root
        matrix = matrix / norm
        matrix, power = matrix @ matrix, 2 * power
    return float(torch.tensor(bound).exp())
