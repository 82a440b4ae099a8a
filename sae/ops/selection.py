"""Which latents of a batch fire: the k largest of a row, the largest of a batch, those above a threshold.

All choose from blocks of rows (see `sae.ops.encoder`), and change a block as they like.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from sae.ops.encoder import Block, PreActs
from sae.ops.group import ALONE, Group
from sae.ops.largest import largest
from sae.ops.sparse import SparseLatents, joined

_SAMPLE = 2**16
"""Numbers of a block by which those are guessed that are among the largest of a batch."""
_ROWS = 16
"""Rows whose largest is found first where the largest of a column is looked for."""


class Forced(NamedTuple):
    """Entries that are to be chosen whatever else is; of no latent two."""

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

    def among(self, places: Int[Tensor, " entries"], n_latents: int) -> Bool[Tensor, " entries"]:
        """Which entries of a matrix are of these, of each its row times n_latents and its latent."""
        row_of = torch.full((n_latents,), -1, device=places.device).scatter(0, self.latents, self.rows)
        rows = places // n_latents
        return row_of[places - rows * n_latents] == rows


def block_by_block(
    pre_acts: PreActs,
    choose: Callable[[Tensor, tuple[Tensor, Tensor] | None], SparseLatents],
    forced: Forced | None = None,
) -> SparseLatents:
    """What `choose` takes of every block of rows, as one code.

    A kernel that chooses while it multiplies, and never writes a pre-activation that is not chosen, belongs
    here: until it is gone through, `PreActs` is the two factors and the bias.

    Args:
        pre_acts: of all rows.
        choose: gets the pre-activations of some rows, and which entries of them are forced.
        forced: entries of all rows that are to be taken.
    """
    parts = []
    for block in pre_acts:
        parts.append(choose(block.pre_acts, None if forced is None else forced.within(block)))
        del block  # before the next one is made
    return joined(parts)


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
        values, indices = largest(pre_acts, k)
    else:
        known = pre_acts[first]
        pre_acts[first] = torch.inf
        indices = largest(pre_acts, k).columns
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
    pre_acts: PreActs,
    count: int,
    group: Group = ALONE,
    turn: Int[Tensor, " some"] | None = None,
) -> tuple[SparseLatents, Forced | None]:
    """Those of the `count` largest pre-activations of all ranks' rows that lie in this rank's rows.

    The choice is exact: together the ranks choose what one rank would that had all the rows. Which of several
    equal values are the last to be taken is left open.

    Args:
        pre_acts: of this rank's rows.
        count: how many, of all ranks.
        group: ranks that share the batch.
        turn: latents that come first, and count: each in the row of all where it is strongest.

    Returns:
        The entries, and which of them are those that came first.
    """
    strongest = None if turn is None else _StrongestRows(turn)
    values, places = _largest(pre_acts, count, _low_level, strongest)
    if len(values) < min(count, pre_acts.n_rows * pre_acts.n_latents):  # the level was too high
        values, places = _largest(pre_acts, count, None, None)
    n_latents = pre_acts.n_latents
    forced = None if strongest is None else strongest.of_all_ranks(group)
    if forced is not None:
        ordinary = ~forced.among(places, n_latents)
        count = max(0, count - int(forced.of_all))
        values, places = values[ordinary], places[ordinary]
    values, places = _largest_of(values, places, count)
    if group.world > 1:
        values, order = values.sort(descending=True)
        chosen = _among_all(values, count, group)
        values, places = values[chosen], places[order[chosen]]
    if forced is not None:
        values = torch.cat([values, forced.values.to(values)])
        places = torch.cat([places, forced.rows * n_latents + forced.latents])
    places, order = places.sort()
    return _entries(values[order], places, pre_acts.n_rows, n_latents), forced


def _largest(
    pre_acts: PreActs,
    count: int,
    level_of: Callable[[PreActs, Tensor, int], Tensor | None] | None,
    strongest: _StrongestRows | None,
) -> tuple[Tensor, Tensor]:
    """The `count` largest with their places, and maybe more; fewer only where `level_of` is too high.

    Args:
        pre_acts: gone through once.
        count: how many.
        level_of: of the first block, a level that those in question are above.
        strongest: is shown every block.
    """
    values, places, bound = torch.empty(0), torch.empty(0), None
    for block in pre_acts:
        flat = block.pre_acts.flatten()
        start = block.first * pre_acts.n_latents
        if strongest is not None:
            strongest.see(block, strongest.latents)
        if block.first == 0 and level_of is not None:
            bound = level_of(pre_acts, flat, count)
        if bound is None:
            new, at = flat.topk(min(count, len(flat)), sorted=False)
        else:  # only what is above it can be among them
            at = (flat > bound).nonzero().squeeze(1)
            new = flat[at]
        at += start
        values, places = (new, at) if start == 0 else (torch.cat([values, new]), torch.cat([places, at]))
        if len(values) >= 2 * count or bound is None:
            values, places = _largest_of(values, places, count)
            if 0 < count == len(values):
                bound = values.min()
        del block, flat, new, at  # before the next one is made
    return values, places


def _low_level(pre_acts: PreActs, flat: Tensor, count: int) -> Tensor | None:
    """A level that likely a few more than the `count` largest are above, by some of the first block's.

    None where choosing from the whole block is as fast.
    """
    if flat.device.type != "cpu":
        return None
    some = flat[:: len(flat) // _SAMPLE | 1]  # an odd step comes by all latents
    expected = len(some) * count / max(1, pre_acts.n_rows * pre_acts.n_latents)
    rank = math.ceil(1.1 * expected + 4 * expected**0.5)
    return None if rank >= len(some) else some.topk(rank + 1, sorted=False).values.min()


def _largest_of(values: Tensor, places: Tensor, count: int) -> tuple[Tensor, Tensor]:
    if len(values) <= count:
        return values, places
    values, kept = values.topk(count, sorted=False)
    return values, places[kept]


def strongest_rows(pre_acts: PreActs, latents: Int[Tensor, " some"], group: Group = ALONE) -> Forced:
    """Of each of some latents, the first of all ranks' rows where it is largest, and positive.

    Args:
        pre_acts: of those latents only.
        latents: what they are called.
        group: ranks that share the batch; each gets its own rows'.
    """
    strongest, columns = _StrongestRows(latents), torch.arange(len(latents), device=latents.device)
    for block in pre_acts:
        strongest.see(block, columns)
        del block  # before the next one is made
    return strongest.of_all_ranks(group)


class _StrongestRows:
    """The first row where each of some latents is largest, of the rows seen so far."""

    def __init__(self, latents: Tensor) -> None:
        self.latents = latents
        self.best: Tensor | None = None
        self.rows = torch.zeros_like(latents)

    def see(self, block: Block, columns: Tensor) -> None:
        """Takes the latents' next rows, which are these columns of a block."""
        first, pre_acts = block
        best, rows = _maxima(pre_acts, columns)
        if self.best is None:
            self.best = torch.full_like(best, -torch.inf)
        better = best > self.best
        self.best = torch.where(better, best, self.best)
        self.rows = torch.where(better, rows + first, self.rows)

    def of_all_ranks(self, group: Group) -> Forced:
        """What has been found, and by which rank."""
        assert self.best is not None, "there must be a block"
        # Not only the height: equal rows, as those of a text's first token are, lie on several ranks.
        everyones = group.gather_equal(self.best)
        mine = (everyones.argmax(dim=0) == group.rank) & (self.best > 0)
        of_all = (everyones.amax(dim=0) > 0).sum()
        return Forced(self.rows[mine], self.latents[mine], self.best[mine], of_all)


def _maxima(matrix: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """The largest number of some columns, and the first row that it is in."""
    n_rows = len(matrix)
    if n_rows == 0:
        return matrix.new_full((len(columns),), -torch.inf), torch.zeros_like(columns)
    if matrix.device.type != "cpu" or n_rows < 2 * _ROWS:
        return matrix[:, columns].max(dim=0)
    # `max` with places goes down each column by itself; `amax` runs along the rows.
    many = matrix[: n_rows // _ROWS * _ROWS].unflatten(0, (-1, _ROWS))
    best, which = many.amax(1)[:, columns].max(dim=0)
    rows = many[which, :, columns].argmax(1) + which * _ROWS
    if n_rows % _ROWS:
        last, row = _maxima(matrix[-(n_rows % _ROWS) :], columns)
        rows = torch.where(last > best, row + n_rows // _ROWS * _ROWS, rows)
        best = torch.maximum(best, last)
    return best, rows


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
