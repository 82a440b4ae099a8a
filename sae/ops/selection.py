"""Which latents of a batch fire: the k largest of a row, the largest of a batch, those above a threshold."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from sae.ops.group import ALONE, Group
from sae.ops.sparse import SparseLatents


def top_k(pre_acts: Float[Tensor, "rows n_latents"], k: int) -> SparseLatents:
    """The k largest pre-activations of every row, as they are (not rectified)."""
    values, indices = pre_acts.topk(k, dim=-1, sorted=False)
    offsets = torch.arange(0, values.numel() + 1, k, device=values.device)
    return SparseLatents(values.flatten(), indices.flatten(), offsets)


def top_of_batch(
    pre_acts: Float[Tensor, "rows n_latents"], count: int, group: Group = ALONE
) -> SparseLatents:
    """Those of the `count` largest pre-activations of all ranks' rows that lie in this rank's rows.

    The choice is exact: together the ranks choose what one rank would that had all the rows. Which of several
    equal values are the last to be taken is left open.
    """
    flat = pre_acts.flatten()
    values, places = flat.topk(min(count, len(flat)), sorted=group.world > 1)
    if group.world > 1:
        places = places[_among_all(values, count, group)]
    return _at_places(pre_acts, places.sort().values)


def where(pre_acts: Float[Tensor, "rows n_latents"], mask: Bool[Tensor, "rows n_latents"]) -> SparseLatents:
    """The pre-activations where the mask is set."""
    return _at_places(pre_acts, mask.flatten().nonzero().squeeze(1))


def above(pre_acts: Float[Tensor, "rows n_latents"], threshold: Float[Tensor, ...]) -> SparseLatents:
    """The pre-activations above a threshold, one for all or one for each latent.

    They are compared in float32 or better: a number without axes would take their precision instead.
    """
    exact = torch.promote_types(pre_acts.dtype, torch.float32)
    return where(pre_acts, pre_acts > threshold.to(exact).reshape(-1))


def prefer(
    pre_acts: Float[Tensor, "rows n_latents"], rows: Int[Tensor, " some"], latents: Int[Tensor, " some"]
) -> Float[Tensor, "rows n_latents"]:
    """The pre-activations with some entries infinite, so that any choice of the largest begins with these."""
    return pre_acts.index_put((rows, latents), pre_acts.new_tensor(torch.inf))


def strongest_rows(
    pre_acts: Float[Tensor, "rows n_latents"], latents: Int[Tensor, " some"], group: Group = ALONE
) -> tuple[Int[Tensor, " mine"], Int[Tensor, " mine"]]:
    """Of each of some latents, the first of all ranks' rows where its pre-activation is largest.

    Returns rows and latents of those where that row is this rank's and the pre-activation positive.
    """
    best, rows = pre_acts[:, latents].max(dim=0)
    # Not only the height: rows that are equal, as those of a text's first token are, lie on several ranks.
    mine = (group.gather_equal(best).argmax(dim=0) == group.rank) & (best > 0)
    return rows[mine], latents[mine]


def _among_all(values: Tensor, count: int, group: Group) -> Tensor:
    """Which of this rank's descending values are among the `count` largest of all ranks.

    Every rank has its part of `count` values at or above some level, so none below the lowest of these levels
    is chosen; what is not below it is sent: little more than `count` values in all.
    """
    part = -(-count // group.world)
    bound = -values[part - 1] if 0 < part <= len(values) else values.new_tensor(torch.inf)
    group.max_(bound)
    n = (values >= -bound).sum()
    longest = n.clone()
    group.max_(longest)
    sent = values.new_full((int(longest),), -torch.inf)
    sent[: int(n)] = values[: int(n)]
    everyones = group.gather_equal(sent)
    chosen = torch.zeros_like(everyones, dtype=torch.bool)
    chosen.view(-1)[everyones.flatten().topk(min(count, everyones.numel()), sorted=False).indices] = True
    return chosen[group.rank, : int(n)].nonzero().squeeze(1)


def _at_places(pre_acts: Tensor, places: Tensor) -> SparseLatents:
    """Entries of a matrix by their ascending places in it, row after row."""
    n_rows, n_latents = pre_acts.shape
    rows = places // n_latents
    counts = rows.new_zeros(n_rows).scatter_add_(0, rows, torch.ones_like(rows))
    return SparseLatents(
        pre_acts.flatten()[places], places - rows * n_latents, F.pad(counts.cumsum(0), (1, 0))
    )
