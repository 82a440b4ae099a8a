"""How many of given directions are almost orthogonal to one another: |cos| < epsilon between any two."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.errors import InputError
from sae.ops.geometry import random_rows, unit_rows

MARGIN = 1e-6
"""Float32 cosines are off by less than this; so much below epsilon still counts as a conflict."""
# The most rows whose conflicts are all held, as bits: 128 MiB at one epsilon, _BYTES for those held at once.
_MOST_BITS, _BYTES = 32_768, 2**29
# Cosines in a block, few enough for a processor's cache; rows taken at a time, and kept ones that these are
# held against at once.
_COSINES, _OFFERED, _SLICE = 2**20, 512, 2048
_ONES = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(axis=1)
"""In each byte."""
# Rows that conflicts are counted against where not all pairs are looked at.
_SAMPLE = 4096


class Size(NamedTuple):
    """How many almost-orthogonal directions there are; a basis has d of them at any epsilon."""

    epsilon: float
    found: int
    """Among the directions: a lower bound."""
    random: int
    """Among as many random ones, found in the same way."""


def largest_almost_orthogonal_subset(
    directions: Float[Tensor, "n d_model"],
    epsilon: float,
    orders: int = 20,
    seed: int = 0,
    candidates: Int[Tensor, " _"] | None = None,
) -> Int[Tensor, " kept"]:
    """The largest subset found with |cos| < epsilon between any two: a lower bound, as the largest is hard.

    Greedy: rows are taken in some order, and each that has no conflict with those kept is kept too, so
    nothing can be added to what comes out. Tried are `orders` random ones and, as a heuristic, one that
    begins with the rows of fewest conflicts (counted exactly up to 32,768 rows, beyond that against 4,096 of
    the rows); the largest result is returned. Up to 32,768 rows all conflicts are held as bits, beyond that
    candidates are held against those kept, block by block; both give the same for one order.

    Args:
        directions: Rows of any length but zero; v and -v are in conflict.
        epsilon: Bound on |cos|. Float32 cosines within `MARGIN` of it count as conflicts.
        orders: Random orders to try; more never find less.
        seed: Of the orders.
        candidates: Rows that may be chosen, e.g. those that fire; None = all.

    Returns:
        Indices of rows, ascending.
    """
    rows = torch.arange(len(directions)) if candidates is None else candidates.cpu().unique()
    if len(rows) and not 0 <= rows[0] <= rows[-1] < len(directions):
        raise InputError(
            f"`candidates` must be in [0, {len(directions)}), got {int(rows[0])} to {int(rows[-1])}."
        )
    unit = unit_rows(directions[rows.to(directions.device)]).float()
    (kept,) = _largest(unit, [epsilon], orders, seed)
    return rows[kept].to(directions.device)


def sizes_by_epsilon(
    directions: Float[Tensor, "n d_model"], epsilons: Sequence[float], orders: int = 20, seed: int = 0
) -> list[Size]:
    """`largest_almost_orthogonal_subset` at every epsilon, beside random rows of the same shape."""
    unit = unit_rows(directions).float()
    null = random_rows(*unit.shape, torch.Generator().manual_seed(seed)).to(unit)
    found, random = (_largest(rows, epsilons, orders, seed) for rows in (unit, null))
    return [Size(e, len(f), len(r)) for e, f, r in zip(epsilons, found, random, strict=True)]


class Packing:
    """A growing set of unit rows with |cos| < epsilon between any two."""

    def __init__(self, d_model: int, epsilon: float, device: torch.device | None = None) -> None:
        _check([epsilon], 0)
        self._least = epsilon - MARGIN
        self._rows = torch.zeros(_SLICE, d_model, device=device)
        self._n = 0

    def __len__(self) -> int:
        return self._n

    @property
    def rows(self) -> Float[Tensor, "kept d_model"]:
        """Those kept, in the order in which they came."""
        return self._rows[: self._n]

    def offer(self, unit: Float[Tensor, "offered d_model"]) -> Int[Tensor, " kept"]:
        """Keeps, one after the other, the unit rows without a conflict with any kept one; their places."""
        places = torch.arange(len(unit), device=unit.device)
        for begin in range(0, self._n, _SLICE):  # most drop out at the first slices
            cosines = unit[places] @ self._rows[begin : min(self._n, begin + _SLICE)].T
            places = places[cosines.abs_().amax(1) < self._least]
        conflicts = _conflicts(unit[places], unit[places].T, [self._least])[0]
        kept = places[_greedy(np.packbits(conflicts, axis=1), np.arange(len(places)))]
        self._append(unit[kept])
        return kept

    def _append(self, rows: Tensor) -> None:
        end = self._n + len(rows)
        if end > len(self._rows):
            more = self._rows.new_zeros(max(end, len(self._rows)), self._rows.shape[1])
            self._rows = torch.cat([self._rows, more])
        self._rows[self._n : end] = rows
        self._n = end


def _largest(unit: Tensor, epsilons: Sequence[float], orders: int, seed: int) -> list[Tensor]:
    """At each epsilon the places of the largest subset over all orders, ascending."""
    _check(epsilons, orders)
    n = len(unit)
    if n > _MOST_BITS:
        return [_best(_kept_by_blocks(unit, e), _counts(unit, e), orders, seed) for e in epsilons]
    found = []
    at_once = max(1, _BYTES * 8 // (n * n))
    for begin in range(0, len(epsilons), at_once):
        for bits, counts in _all_conflicts(unit, epsilons[begin : begin + at_once]):
            found.append(_best(partial(_greedy, bits), counts, orders, seed))
    return found


def _best(keep: Callable[[np.ndarray], Tensor], counts: np.ndarray, orders: int, seed: int) -> Tensor:
    """The largest of what is kept in the order of rising counts and in random ones."""
    generator = torch.Generator().manual_seed(seed)
    best = keep(counts.argsort(kind="stable"))
    for _ in range(orders):
        best = max(best, keep(torch.randperm(len(counts), generator=generator).numpy()), key=len)
    return best.sort().values


def _all_conflicts(unit: Tensor, epsilons: Sequence[float]) -> list[tuple[np.ndarray, np.ndarray]]:
    """At each epsilon the conflicts of every row as bits, and their number."""
    n, columns = len(unit), unit.T.contiguous()  # thin products are faster with it so
    bits = [np.empty((n, -(-n // 8)), dtype=np.uint8) for _ in epsilons]
    counts = [np.empty(n, dtype=np.int64) for _ in epsilons]
    step = max(1, _COSINES // n)
    for begin in range(0, n, step):
        block = _conflicts(unit[begin : begin + step], columns, [e - MARGIN for e in epsilons])
        for some, number, conflicts in zip(bits, counts, block, strict=True):
            some[begin : begin + step] = np.packbits(conflicts, axis=1)
            number[begin : begin + step] = _ONES[some[begin : begin + step]].sum(axis=1)
    return list(zip(bits, counts, strict=True))


def _conflicts(rows: Tensor, columns: Tensor, least: Sequence[float]) -> list[np.ndarray]:
    """Where |cos| is at least so large, for each of the bounds; numpy compares six times as fast as torch."""
    cosines = (rows @ columns).abs_().cpu().numpy()
    return [cosines >= np.float32(bound) for bound in least]


def _greedy(bits: np.ndarray, order: np.ndarray) -> Tensor:
    """Places kept when rows come in this order, from their conflicts as bits."""
    blocked = np.zeros(bits.shape[1], dtype=np.uint8)
    byte_of = memoryview(blocked)  # a read of one byte costs a fifth of numpy's
    kept = []
    for begin in range(0, len(order), _OFFERED):
        block = order[begin : begin + _OFFERED]
        free = block[np.unpackbits(blocked)[block] == 0]
        for place in free.tolist():
            if not byte_of[place >> 3] & (128 >> (place & 7)):
                kept.append(place)
                np.bitwise_or(blocked, bits[place], out=blocked)
    return torch.tensor(kept, dtype=torch.int64)


def _kept_by_blocks(unit: Tensor, epsilon: float) -> Callable[[np.ndarray], Tensor]:
    """What `_greedy` does, without the conflicts of all pairs."""

    def keep(order: np.ndarray) -> Tensor:
        packing = Packing(unit.shape[1], epsilon, unit.device)
        blocks = torch.from_numpy(order).split(_OFFERED)
        return torch.cat([block[packing.offer(unit[block.to(unit.device)]).cpu()] for block in blocks])

    return keep


def _counts(unit: Tensor, epsilon: float) -> np.ndarray:
    """Conflicts of every row with some of the rows, evenly spread."""
    some = unit[:: -(-len(unit) // _SAMPLE)].T.contiguous()
    blocks = unit.split(_COSINES // _SAMPLE)
    return np.concatenate([_conflicts(rows, some, [epsilon - MARGIN])[0].sum(axis=1) for rows in blocks])


def _check(epsilons: Sequence[float], orders: int) -> None:
    for epsilon in epsilons:
        if not 2 * MARGIN < epsilon < 1:
            raise InputError(f"`epsilon` must be in ({2 * MARGIN:g}, 1), got {epsilon}; it bounds |cos|.")
    if orders < 0:
        raise InputError(f"`orders` must be at least 0, got {orders}; 0 tries the heuristic's one alone.")
