"""Exact non-negative least-squares codes for many rows at once, however alike the atoms are."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from sae.ops.nonnegative import nonnegative_codes

# Steps that find most of the entries that are zero.
_FIRST_STEPS = 50
# Added to the unit diagonal of the scaled Gram matrix: with more atoms than dimensions there is one code
# all the same, and |x - zH|² is above the least by no more than this share of |z|².
_RIDGE = 1e-10
# A code or slope below zero by this share of the largest correlation is rounding.
_FLOOR = 1e-10
# Exchanges, after which a row that goes round in circles is left to steps: atoms that depend on each other.
_EXCHANGES = 20
# Numbers in the Gram matrices of the rows worked on together.
_NUMBERS = 2**22


@torch.no_grad()
def exact_nonnegative_codes(
    gram: Float64[Tensor, "r r"], correlations: Float64[Tensor, "rows r"]
) -> Float64[Tensor, "rows r"]:
    """For every row, the z >= 0 with the least ½ z G zᵀ - c zᵀ, to rounding.

    `nonnegative_codes` takes steps, many where atoms are alike, and its result is a little above the least.
    Here a few steps guess which entries are zero; the others are solved for, those that come out negative and
    zeros that would rather be positive change sides, until there are none. One Cholesky decomposition a row
    and exchange, as wide as the row has entries. Rows for which that does not end, which happens with more
    atoms than dimensions, get steps after all.

    Args:
        gram: G, symmetric and positive semi-definite to float64. A component with a zero on the diagonal gets
            code 0.
        correlations: c, one row per problem.

    References:
        "Fast Nonnegative Matrix Factorization: An Active-Set-Like Method and Comparisons", Kim & Park, 2011
        (block principal pivoting; here each row has its own sets).
    """
    scale = gram.diagonal().clamp(min=0).sqrt()
    inverse = torch.where(scale > 0, 1 / scale, 0)
    unit_gram = gram * inverse * inverse[:, None]
    unit_gram.diagonal().add_(_RIDGE)
    targets = correlations * inverse
    guess = nonnegative_codes(unit_gram.float(), targets.float(), steps=_FIRST_STEPS) > 0
    size = max(1, _NUMBERS // gram.numel())
    pairs = zip(targets.split(size), guess.split(size), strict=True)
    return torch.cat([_exchange(unit_gram, *pair) for pair in pairs]) * inverse


def _exchange(
    gram: Float64[Tensor, "r r"], targets: Float64[Tensor, "rows r"], free: Bool[Tensor, "rows r"]
) -> Float64[Tensor, "rows r"]:
    """Codes of some rows, from a guess of which entries are positive."""
    codes = torch.zeros_like(targets)
    todo = torch.arange(len(targets), device=targets.device)
    floor = -_FLOOR * targets.abs().amax(dim=1, keepdim=True)
    for _ in range(_EXCHANGES):
        solution = _solve_free(gram, targets, free)
        wrong = torch.where(free, solution, solution @ gram - targets) < floor
        codes[todo] = solution.clamp(min=0)
        left = wrong.any(dim=1)
        if not left.any():
            return codes
        todo, targets, free, floor = todo[left], targets[left], (free ^ wrong)[left], floor[left]
    codes[todo] = nonnegative_codes(gram, targets)
    return codes


def _solve_free(gram: Tensor, targets: Tensor, free: Tensor) -> Tensor:
    """Least squares over the free entries of every row; zero in the others."""
    size = max(int(free.sum(dim=1).max()), 1)
    slots = free.to(torch.int8).argsort(dim=1, descending=True, stable=True)[:, :size]
    used = free.gather(1, slots)
    both = used[:, :, None] & used[:, None, :]
    eye = torch.eye(size, dtype=gram.dtype, device=gram.device)
    system = torch.where(both, gram[slots[:, :, None], slots[:, None, :]], eye)
    aim = (targets.gather(1, slots) * used)[:, :, None]
    values = torch.cholesky_solve(aim, torch.linalg.cholesky(system)).squeeze(2)
    return torch.zeros_like(targets).scatter_(1, slots, values)
