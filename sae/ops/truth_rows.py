"""The rows that scores against the truth are read beside: what chance has, and what the truth itself has."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from sae.ops.pursuit import nonnegative_pursuit
from sae.ops.sparse import SparseLatents, sparse_decode
from sae.ops.truth import TruthMetrics, TruthScores


def random_directions(n: int, d_model: int, seed: int = 0) -> Float[Tensor, "n d_model"]:
    """Random unit rows: a dictionary that has learned nothing."""
    generator = torch.Generator().manual_seed(seed)
    return F.normalize(torch.randn(n, d_model, generator=generator), dim=-1)


def pursuit_with_counts(
    x: Float[Tensor, "rows d_model"], atoms: Float[Tensor, "n_latents d_model"], counts: Int[Tensor, " rows"]
) -> SparseLatents:
    """A pursuit's code with the true number of entries in every row: told how many fire, not which.

    Non-negative orthogonal matching pursuit takes as many atoms as the largest of `counts`, and each row
    keeps its `counts` largest coefficients. What a row does not need comes out small, so this is at least as
    good a support as stopping after `counts` atoms; the coefficients are not refitted.

    Args:
        x: rows, the world's bias taken off.
        atoms: unit rows.
        counts: true features that fire on each row.
    """
    k = min(max(1, int(counts.max())), len(atoms))
    code = nonnegative_pursuit(x, atoms, k)
    rows = code.rows
    order = code.values.argsort(descending=True)
    order = order[rows[order].argsort(stable=True)]  # row after row, the largest first
    place = torch.arange(len(order), device=order.device) - code.row_offsets[rows]
    kept = order[place < counts[rows]]
    lengths = torch.bincount(rows[kept], minlength=len(x))
    return SparseLatents(code.values[kept], code.indices[kept], F.pad(lengths.cumsum(0), (1, 0)))


@torch.inference_mode()
def scores_of(
    batches: Iterable[tuple[Float[Tensor, "rows d_model"], SparseLatents]],
    metrics: TruthMetrics,
    encode: Callable[[Tensor], SparseLatents],
    decode: Callable[[SparseLatents], Tensor],
) -> TruthScores:
    """Scores of a dictionary on rows whose codes are known.

    Args:
        batches: rows and their true codes; a world's `PlantedRows`.
        metrics: of the dictionary's directions, with nothing added yet.
        encode: from rows to their codes.
        decode: from codes to reconstructions.
    """
    for x, truth in batches:
        code = encode(x)
        metrics.add(x, decode(code), code, truth)
    return metrics.compute()


@torch.no_grad()
def reference_scores(
    batches: Iterable[tuple[Float[Tensor, "rows d_model"], SparseLatents]],
    atoms: Float[Tensor, "n_latents d_model"],
    features: Float[Tensor, "n_true d_model"],
    bias: Float[Tensor, " d_model"],
    parents: Int[Tensor, " n_true"] | None = None,
) -> TruthScores:
    """Scores of fixed directions with a pursuit's code at the true count of each row.

    With the true directions it says what is possible: how often the best of codes is wrong in such a crowd.
    With `random_directions` it says what chance has.

    Args:
        batches: rows and their true codes; a world's `PlantedRows`.
        atoms: the directions to score.
        features: the true ones.
        bias: the world's; taken off the rows before, put back after.
        parents: of the true features.
    """
    metrics = TruthMetrics(atoms, features, parents)
    for x, truth in batches:
        code = pursuit_with_counts(x - bias, atoms, truth.row_offsets.diff())
        metrics.add(x, sparse_decode(code, atoms) + bias, code, truth)
    return metrics.compute()
