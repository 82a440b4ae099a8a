"""Non-negative least-squares codes for many rows at once, by matrix products only."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

# Rows solved together: their iterates (rows, r) stay in the processor's cache, and each group may stop early.
_CHUNK = 2048
# Steps between two looks at the stopping rule; on an accelerator every look waits for the device.
_CHECK_EVERY = 10


@torch.no_grad()
def nonnegative_codes(
    gram: Float[Tensor, "r r"],
    correlations: Float[Tensor, "rows r"],
    *,
    steps: int = 2000,
    tolerance: float = 1e-6,
    start: Float[Tensor, "rows r"] | None = None,
) -> Float[Tensor, "rows r"]:
    """For every row, the z >= 0 with the least ½ z G zᵀ - c zᵀ.

    With G = H Hᵀ and c = x Hᵀ these are the non-negative least-squares codes of x on the rows of H.
    Accelerated projected gradient with a restart of the momentum, row by row, whenever a step goes
    against it; one (rows, r) x (r, r) product a step. Unknowns are scaled to a unit diagonal of G first.
    It ends when no code moves by more than `tolerance` of the largest code, or after `steps`; the
    result is feasible at any step, and the same for the same input.

    Args:
        gram: G, symmetric and positive semi-definite. A component with a zero on the diagonal gets code 0.
        correlations: c, one row per problem.
        steps: The most steps taken.
        tolerance: Relative movement at which a group of rows counts as solved.
        start: Codes to start from, zeros when left out.

    References:
        "A Fast Iterative Shrinkage-Thresholding Algorithm for Linear Inverse Problems", Beck & Teboulle,
        2009. "Adaptive Restart for Accelerated Gradient Schemes", O'Donoghue & Candès, 2012,
        arXiv:1204.3982 (the gradient scheme; here each row restarts by itself).
    """
    if len(correlations) == 0:
        return correlations.clone()
    scale = gram.diagonal().clamp(min=0).sqrt()
    inverse = torch.where(scale > 0, 1 / scale, 0)
    unit_gram = gram * inverse * inverse[:, None]
    lipschitz = torch.linalg.eigvalsh(unit_gram)[-1].clamp(min=torch.finfo(gram.dtype).tiny)
    step_matrix = torch.eye(len(gram), dtype=gram.dtype, device=gram.device) - unit_gram / lipschitz
    targets = (correlations * (inverse / lipschitz)).split(_CHUNK)
    starts = [None] * len(targets) if start is None else (start * scale).split(_CHUNK)
    solved = [_solve(step_matrix, *pair, steps, tolerance) for pair in zip(targets, starts, strict=True)]
    return torch.cat(solved) * inverse


def _solve(step_matrix: Tensor, target: Tensor, start: Tensor | None, steps: int, tolerance: float) -> Tensor:
    """The fixed point z = relu(z @ step_matrix + target)."""
    codes = torch.zeros_like(target) if start is None else start.clamp(min=0)
    ahead, previous = codes.clone(), torch.empty_like(codes)
    momentum = target.new_ones(len(target), 1)
    for step in range(1, steps + 1):
        previous, codes = codes, torch.addmm(target, ahead, step_matrix, out=previous).clamp_(min=0)
        moved = codes - previous
        against = torch.linalg.vecdot(ahead.sub_(codes), moved)[:, None] > 0
        momentum.masked_fill_(against, 1)
        following = (1 + (1 + 4 * momentum.square()).sqrt()) / 2
        torch.addcmul(codes, (momentum - 1) / following, moved, out=ahead)
        momentum = following
        if step % _CHECK_EVERY == 0 and moved.abs().max() <= tolerance * codes.max():
            break
    return codes
