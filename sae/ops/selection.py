"""Which latents of a batch fire: the k largest of a row, the largest of a batch, those above a threshold.

All choose from blocks of rows (see `sae.ops.encoder`), and change a block as they like.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from sae.ops.encoder import Block
from sae.ops.group import ALONE, Group
from sae.ops.largest import largest
from sae.ops.sparse import SparseLatents


class Forced(NamedTuple):
    """Entries that are to be chosen whatever else is."""

    rows: Int[Tensor, " some"]
    latents: Int[Tensor, " some"]
    values: Float[Tensor, " some"]
    """Their pre-activations."""
    of_all: Int[Tensor, ""]
    """How many there are on all ranks."""

    def within(self, block: Block) -> tuple[Tensor, Tensor]:
        """Rows, counted from the block's first, and latents of those in a block."""
        rows = self.rows - block.first
        here = (rows >= 0) & (rows < len(block.pre_acts))
        return rows[here], self.latents[here]

    def among(self, code: SparseLatents, n_latents: int) -> Bool[Tensor, " active"]:
        """Which entries of a code are of these."""
        return torch.isin(code.rows * n_latents + code.indices, self.rows * n_latents + self.latents)


def top_k(
    pre_acts: Float[Tensor, "rows n_latents"], k: int, first: tuple[Tensor, Tensor] | None = None
) -> SparseLatents:
    """The k largest pre-activations of every row, as they are (not rectified).

    Args:
        pre_acts: of the rows.
        k: how many.
        first: rows and latents that are taken before any others.
    """
    if first is None:
        indices = largest(pre_acts, k)
    else:
        known = pre_acts[first]
        pre_acts[first] = torch.inf
        indices = largest(pre_acts, k)
        pre_acts[first] = known
    values = pre_acts.gather(1, indices)
    offsets = torch.arange(0, values.numel() + 1, k, device=values.device)
    return SparseLatents(values.flatten(), indices.flatten(), offsets)


def above(
    pre_acts: Float[Tensor, "rows n_latents"],
    threshold: Float[Tensor, ...],
    first: tuple[Tensor, Tensor] | None = None,
) -> SparseLatents:
    """The pre-activations above a threshold, one for all or one for each latent.

    They are compared in float32 or better: a number without axes would take their precision instead.

    Args:
        pre_acts: of the rows.
        threshold: to be exceeded.
        first: rows and latents that are taken, above it or not.
    """
    exact = torch.promote_types(pre_acts.dtype, torch.float32)
    chosen = pre_acts > threshold.to(exact).reshape(-1)
    if first is not None:
        chosen[first] = True
    places = chosen.flatten().nonzero().squeeze(1)
    return _entries(pre_acts.flatten()[places], places, *pre_acts.shape)


def top_of_batch(
    blocks: Iterable[Block], count: int, group: Group = ALONE, forced: Forced | None = None
) -> SparseLatents:
    """Those of the `count` largest pre-activations of all ranks' rows that lie in this rank's rows.

    The choice is exact: together the ranks choose what one rank would that had all the rows. Which of several
    equal values are the last to be taken is left open. Forced entries are chosen first, and count.
    """
    if forced is not None:
        count = max(0, count - int(forced.of_all))
    best: tuple[Tensor, Tensor] | None = None
    bound: Tensor | None = None
    n_rows = n_latents = 0
    for block in blocks:
        n_rows, n_latents = block.first + len(block.pre_acts), block.pre_acts.shape[1]
        flat = block.pre_acts.flatten()
        if forced is not None:
            rows, latents = forced.within(block)
            flat[rows * n_latents + latents] = -torch.inf
        # Only what is above the least of those kept so far can take its place.
        found = None if bound is None else (flat > bound).nonzero().squeeze(1)
        new = flat if found is None else flat[found]
        new, kept = new.topk(min(count, len(new)), sorted=False)
        at = block.first * n_latents + (kept if found is None else found[kept])
        values, places = (new, at) if best is None else (torch.cat([best[0], new]), torch.cat([best[1], at]))
        if len(values) > count:
            values, kept = values.topk(count, sorted=False)
            places = places[kept]
        if 0 < count == len(values):
            bound = values.min()
        best = values, places
    assert best is not None, "there must be a block"
    values, places = best
    if group.world > 1:
        values, order = values.sort(descending=True)
        chosen = _among_all(values, count, group)
        values, places = values[chosen], places[order[chosen]]
    if forced is not None:
        values = torch.cat([values, forced.values.to(values)])
        places = torch.cat([places, forced.rows * n_latents + forced.latents])
    places, order = places.sort()
    return _entries(values[order], places, n_rows, n_latents)


def strongest_rows(
    pre_acts: Float[Tensor, "rows some"], latents: Int[Tensor, " some"], group: Group = ALONE
) -> Forced:
    """Of each of some latents, the first of all ranks' rows where it is largest, and positive.

    Args:
        pre_acts: those latents' only.
        latents: what they are called.
        group: ranks that share the batch; each gets its own rows'.
    """
    best, rows = pre_acts.max(dim=0)
    # Not only the height: rows that are equal, as those of a text's first token are, lie on several ranks.
    everyones = group.gather_equal(best)
    mine = (everyones.argmax(dim=0) == group.rank) & (best > 0)
    return Forced(rows[mine], latents[mine], best[mine], (everyones.amax(dim=0) > 0).sum())


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


def _entries(values: Tensor, places: Tensor, n_rows: int, n_latents: int) -> SparseLatents:
    """Entries of a matrix by their ascending places in it, row after row."""
    rows = places // n_latents
    counts = rows.new_zeros(n_rows).scatter_add_(0, rows, torch.ones_like(rows))
    return SparseLatents(values, places - rows * n_latents, F.pad(counts.cumsum(0), (1, 0)))
