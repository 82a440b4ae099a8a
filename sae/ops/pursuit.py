"""Codes with at most k entries a row on given atoms: pursuits of one sign and of both, the k largest."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sae.ops.slots import check_k, energy_to_leave, from_slots, gram_if_it_pays, mixed
from sae.ops.sparse import SparseLatents

# Rows pursued together: bounds memory at _CHUNK * (3 n_latents + 2 k²) float64 numbers, and without a Gram
# matrix of all atoms at _CHUNK * k * d_model more.
_CHUNK = 512
# A correlation below this share of |x| counts as none: what is left of x is rounding.
_FLOOR = 1e-6
# Added to the diagonal of the small systems, so that two all but equal atoms stay solvable.
_RIDGE = 1e-10


@torch.no_grad()
def nonnegative_pursuit(
    x: Float[Tensor, "rows d_model"],
    atoms: Float[Tensor, "n_latents d_model"],
    k: int,
    residual_threshold: float | Float[Tensor, " rows"] = 0.0,
) -> SparseLatents:
    """Non-negative orthogonal matching pursuit: at most k atoms a row, with coefficients > 0.

    Each of k rounds chooses the atom with the largest positive correlation with the residual, then
    refits all chosen coefficients by non-negative least squares. An atom stays chosen: the refit may
    set its coefficient to zero and a later one may raise it again, so a row has k active atoms or
    fewer. A row stops early when no atom correlates with what is left, or when little enough is left.
    Everything happens in float64, on the Gram matrix of the atoms and on x atomsᵀ; where that matrix is too
    large or not worth it, on the residuals and the Gram matrices of the chosen atoms.

    Args:
        x: Rows, already centred.
        atoms: Unit rows.
        k: The most atoms a row may use.
        residual_threshold: Share of |x| at which a row stops; one for all rows or one for each.

    References:
        "On the Uniqueness of Nonnegative Sparse Solutions to Underdetermined Systems of Equations",
        Bruckstein, Elad & Zibulevsky, 2008 (the pursuit). "Solving Least Squares Problems", Lawson &
        Hanson, 1974, chapter 23 (the refit, here for many rows at once).
    """
    return _in_chunks(x, atoms, k, residual_threshold, signed=False)


@torch.no_grad()
def orthogonal_pursuit(
    x: Float[Tensor, "rows d_model"],
    atoms: Float[Tensor, "n_latents d_model"],
    k: int,
    residual_threshold: float | Float[Tensor, " rows"] = 0.0,
) -> SparseLatents:
    """Orthogonal matching pursuit: at most k atoms a row, with coefficients of either sign.

    As `nonnegative_pursuit`, but the atom chosen is the one with the largest |correlation|, and the refit is
    plain least squares. What is left of a row is orthogonal to the atoms chosen for it.

    Args:
        x: Rows, already centred.
        atoms: Unit rows.
        k: The most atoms a row may use.
        residual_threshold: Share of |x| at which a row stops; one for all rows or one for each.

    References:
        "Orthogonal matching pursuit: recursive function approximation with applications to wavelet
        decomposition", Pati, Rezaiifar & Krishnaprasad, 1993.
    """
    return _in_chunks(x, atoms, k, residual_threshold, signed=True)


def _in_chunks(
    x: Tensor, atoms: Tensor, k: int, residual_threshold: float | Tensor, signed: bool
) -> SparseLatents:
    check_k(k, len(atoms))
    exact, rows = atoms.double(), x.double()
    gram = gram_if_it_pays(exact, len(rows), k)
    enough = energy_to_leave(rows.square().sum(1), residual_threshold)
    chunks = zip(rows.split(_CHUNK), enough.split(_CHUNK), strict=True)
    parts = [_pursue(exact, gram, k, *chunk, signed) for chunk in chunks]
    values, indices = (torch.cat(side) for side in zip(*parts, strict=True))
    return from_slots(values.to(atoms.dtype), indices)


@torch.no_grad()
def largest_codes(latents: Float[Tensor, "rows n_latents"], k: int) -> SparseLatents:
    """The k latents largest in magnitude in every row, signs kept; zeros are left out."""
    check_k(k, latents.shape[1])
    indices = latents.abs().topk(k, dim=1).indices
    return from_slots(latents.gather(1, indices), indices)


def _pursue(
    atoms: Tensor, gram: Tensor | None, k: int, x: Tensor, enough: Tensor, signed: bool
) -> tuple[Tensor, Tensor]:
    """Coefficients and atoms of every row, (rows, k) each; slots never filled hold zero."""
    correlations = x @ atoms.T
    energy = x.square().sum(1)
    floor = _FLOOR * energy.sqrt()
    values = x.new_zeros(len(x), k)
    chosen = torch.zeros(len(x), k, dtype=torch.int64, device=x.device)
    live = torch.arange(len(x), device=x.device)
    left, residual = energy, correlations
    for size in range(1, k + 1):
        best, atom = (residual.abs() if signed else residual).max(dim=1)
        going = (best > floor[live]) & (left > enough[live])
        live, atom = live[going], atom[going]
        if len(live) == 0:
            break
        chosen[live, size - 1] = atom
        slots = chosen[live, :size]
        target = correlations[live]
        aim = target.gather(1, slots)
        small_gram = _gram_of(atoms[slots]) if gram is None else gram[slots[:, :, None], slots[:, None, :]]
        if signed:
            small_gram.diagonal(dim1=1, dim2=2).add_(_RIDGE)
            refitted = _least_squares(small_gram, aim)
        else:
            refitted = _refit(small_gram, aim, values[live, :size])
        values[live, :size] = refitted
        if size == k:
            break
        if gram is None:
            rest = x[live].sub_(mixed(slots, atoms, refitted))
            left, residual = rest.square().sum(1), rest @ atoms.T
        else:
            explained = mixed(slots, gram, refitted)
            left = energy[live] - (refitted * (2 * aim - explained.gather(1, slots))).sum(1)
            residual = target.sub_(explained)
        residual.scatter_(1, slots, 0.0 if signed else -torch.inf)
    return values, chosen


def _gram_of(chosen: Tensor) -> Tensor:
    return chosen @ chosen.transpose(1, 2)


def _refit(gram: Tensor, target: Tensor, start: Tensor) -> Tensor:
    """Non-negative least squares in every row by active sets (Lawson & Hanson), the last slot new.

    gram (rows, size, size), target and start (rows, size). Rows leave the loop as they are solved: nearly
    all after one solution, because all coefficients come out positive.
    """
    size = target.shape[1]
    gram.diagonal(dim1=1, dim2=2).add_(_RIDGE)
    values = start.clone()
    free = start > 0
    free[:, -1] = True
    todo = torch.arange(len(target), device=target.device)
    for _ in range(3 * size):
        system, aim, now, open_ = gram[todo], target[todo], values[todo], free[todo]
        solution = _solve_free(system, aim, open_)
        blocked = open_ & (solution <= 0)
        stuck = blocked.any(dim=1)
        # Go from the last feasible point towards the solution, as far as every coefficient stays positive.
        share = torch.where(blocked, now / (now - solution), torch.inf).min(dim=1, keepdim=True).values
        moved = torch.where(stuck[:, None], now + share.clamp(max=1) * (solution - now), solution)
        moved = torch.where(blocked & (moved <= 1e-12 * now.amax(1, keepdim=True)), 0, moved).clamp_(min=0)
        open_ = open_ & ((moved > 0) | ~stuck[:, None])
        # A solved row may still gain from a slot that was put to zero before.
        slope = aim - (system @ moved[:, :, None]).squeeze(2)
        gain, slot = slope.masked_fill(open_, -torch.inf).max(dim=1)
        reopen = ~stuck & (gain > _FLOOR * aim.abs().amax(dim=1))
        open_[reopen, slot[reopen]] = True
        values[todo], free[todo] = moved, open_
        todo = todo[stuck | reopen]
        if len(todo) == 0:
            break
    return values


def _solve_free(gram: Tensor, target: Tensor, free: Tensor) -> Tensor:
    """Least squares over the free slots of every row; zero in the others."""
    both = free[:, :, None] & free[:, None, :]
    system = torch.where(both, gram, torch.eye(free.shape[1], dtype=gram.dtype, device=gram.device))
    return _least_squares(system, target * free)


def _least_squares(gram: Tensor, target: Tensor) -> Tensor:
    """Coefficients (rows, size) with gram @ coefficients = target."""
    factor, _ = torch.linalg.cholesky_ex(gram)
    return torch.cholesky_solve(target[:, :, None], factor).squeeze(2)
