"""Which rows make up which training batch: a pure function of seed and step."""

from __future__ import annotations

import bisect
import hashlib
import itertools
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from sae.errors import InputError

SHUFFLE_ROWS = 16_384
"""Rows that are mixed together."""
FEWEST_SHUFFLE_ROWS = 2048
MOST_SHARDS_MIXED = 32
"""Shards read side by side, at most: 8 GiB of shards of the usual size."""


class RowsOfShard(NamedTuple):
    """Some rows of one shard."""

    shard: int
    rows: Int[Tensor, " some"]
    """Rows within the shard, rising."""


class _Pass(NamedTuple):
    windows: list[list[int]]
    """Shards of each window."""
    begins: list[int]
    """Rows of the pass before each window."""


class _Window(NamedTuple):
    """Shards that are read side by side, in rounds of one stretch of each."""

    index: int
    """Counted from the start of the stream, through all passes."""
    begin: int
    """Rows of the pass before it."""
    shards: list[int]
    rows: Int[np.ndarray, " shards"]
    """Rows of each shard."""
    stretches: Int[np.ndarray, "shards rounds"]
    """Which stretch of each shard is read in each round."""
    ends: Int[np.ndarray, " rounds"]
    """Rows of the window up to the end of each round."""


class _Round(NamedTuple):
    window: int
    number: int
    begin: int
    """Rows of the window that earlier rounds have taken."""
    order: Int[np.ndarray, " rows"]
    """The rows it takes, in their order; numbered over the window's shards laid end to end."""


class RowSampler:
    """An endless stream of rows: pass after pass, every row once per pass, each pass in a new order.

    On disk each context's rows are spread evenly over its shard, so a stretch of 1/n of a shard, n being
    the rows of a context, holds about one row of each. A pass takes the shards in a random order, some
    side by side; a round takes one stretch of each of them, in an order of its own for each shard, and
    permutes these rows together. Only a round's rows are mixed in memory, but they come from all contexts
    of all these shards: a small buffer shuffles like a large one.

    The batch of a step is found without going through the steps before it, which is what makes a run
    resumable at any step and a batch the same for any number of ranks.
    """

    def __init__(
        self,
        shard_rows: list[int],
        batch_size: int,
        seed: int,
        rows_per_context: int = 128,
        shuffle_rows: int = SHUFFLE_ROWS,
    ) -> None:
        """Prepares the stream.

        Args:
            shard_rows: rows of each shard.
            batch_size: rows per step over all ranks.
            seed: of the orders.
            rows_per_context: of the cache, at most.
            shuffle_rows: rows to mix together, about; sets how many shards are read side by side.

        Raises:
            InputError: if a batch is larger than a pass, or `shuffle_rows` is too small.
        """
        self.n_rows = sum(shard_rows)
        if not 1 <= batch_size <= self.n_rows:
            raise InputError(
                f"`batch_size` must be in [1, {self.n_rows:,}], the rows of the train split, got"
                f" {batch_size}; lower it or cache more tokens."
            )
        if shuffle_rows < FEWEST_SHUFFLE_ROWS:
            raise InputError(
                f"`shuffle_rows` must be at least {FEWEST_SHUFFLE_ROWS:,}, got {shuffle_rows:,}; a batch"
                " would hold many rows of one context."
            )
        self.batch_size = batch_size
        self._shard_rows, self._seed, self._rounds = shard_rows, seed, max(1, rows_per_context)
        per_window = -(-shuffle_rows * self._rounds * len(shard_rows) // self.n_rows)
        per_window = max(1, min(per_window, MOST_SHARDS_MIXED, len(shard_rows)))
        self.windows_per_pass = -(-len(shard_rows) // per_window)
        self._passes: dict[int, _Pass] = {}
        self._window: _Window | None = None
        self._round: _Round | None = None

    def batch(self, step: int, rank: int = 0, world: int = 1) -> list[RowsOfShard]:
        """The rows of training step `step` (from 0) that fall to a rank: every `world`-th of the batch."""
        found: list[RowsOfShard] = []
        begin, done = step * self.batch_size, 0
        while done < self.batch_size:
            window = self._window_of_row(begin + done)
            taken, first = [], done
            offset = (begin + done) % self.n_rows - window.begin
            while done < self.batch_size and offset < int(window.ends[-1]):
                round_ = self._round_of_row(window, offset)
                at = offset - round_.begin
                rows = round_.order[at : at + self.batch_size - done]
                taken.append(rows)
                done, offset = done + len(rows), offset + len(rows)
            found += self._by_shard(window, np.concatenate(taken)[(rank - first) % world :: world])
        return found

    def window_of(self, step: int) -> int:
        """The window, counted through all passes, that a step's first row lies in."""
        return self._window_of_row(step * self.batch_size).index

    @property
    def last_window(self) -> int:
        """The window that the last row given out lies in."""
        return self._window.index if self._window else 0

    def most_windows(self, steps: int) -> int:
        """Windows that so many steps after one another can read from, at most."""
        each = len(self._shard_rows) // self.windows_per_pass
        smallest = sum(sorted(self._shard_rows)[:each])
        return 2 + (steps * self.batch_size - 2) // smallest

    def shards_of(self, window: int) -> list[int]:
        """The shards of a window."""
        pass_index, within = divmod(window, self.windows_per_pass)
        return self._order_of(pass_index).windows[within]

    def _order_of(self, pass_index: int) -> _Pass:
        """The order of the shards in a pass; those last used are kept."""
        if pass_index not in self._passes:
            order = _permutation(len(self._shard_rows), self._seed, pass_index)
            windows = [part.tolist() for part in np.array_split(order, self.windows_per_pass)]
            rows = [sum(self._shard_rows[shard] for shard in shards) for shards in windows]
            begins = [0, *itertools.accumulate(rows)]
            self._passes = {i: p for i, p in self._passes.items() if abs(i - pass_index) <= 1}
            self._passes[pass_index] = _Pass(windows, begins)
        return self._passes[pass_index]

    def _window_of_row(self, row: int) -> _Window:
        """The window of a row of the stream; the last one used is kept."""
        pass_index, offset = divmod(row, self.n_rows)
        windows, begins = self._order_of(pass_index)
        within = bisect.bisect_right(begins, offset) - 1
        index = pass_index * self.windows_per_pass + within
        if self._window is None or self._window.index != index:
            self._window = self._make_window(index, begins[within], windows[within])
        return self._window

    def _make_window(self, index: int, begin: int, shards: list[int]) -> _Window:
        stretches = np.stack([_permutation(self._rounds, self._seed, index, shard) for shard in shards])
        rows = np.array([self._shard_rows[shard] for shard in shards])
        each = rows[:, None]
        sizes = (stretches + 1) * each // self._rounds - stretches * each // self._rounds
        return _Window(index, begin, shards, rows, stretches, sizes.sum(0).cumsum())

    def _round_of_row(self, window: _Window, offset: int) -> _Round:
        """The round of a row of a window; the last one used is kept."""
        number = int(np.searchsorted(window.ends, offset, side="right"))
        if self._round is None or (self._round.window, self._round.number) != (window.index, number):
            begin = int(window.ends[number - 1]) if number else 0
            stretch = window.stretches[:, number]
            first = stretch * window.rows // self._rounds
            length = (stretch + 1) * window.rows // self._rounds - first
            shift = (window.rows.cumsum() - window.rows + first) - (length.cumsum() - length)
            rows = np.arange(length.sum()) + shift.repeat(length)
            order = _permutation(len(rows), self._seed, window.index, -1, number)
            self._round = _Round(window.index, number, begin, rows[order])
        return self._round

    def _by_shard(self, window: _Window, taken: np.ndarray) -> list[RowsOfShard]:
        """Splits rows of a window by shard.

        They are put in the order of the disk: within a batch the order says nothing, and neighbours in
        memory are read faster.
        """
        ends = window.rows.cumsum()
        taken = np.sort(taken)
        places = np.searchsorted(taken, ends).tolist()
        within = torch.from_numpy(taken - (ends - window.rows).repeat(np.diff([0, *places])))
        return [
            RowsOfShard(shard, within[since:until])
            for shard, since, until in zip(window.shards, [0, *places], places, strict=False)
            if until > since
        ]


def _permutation(n: int, *key: int) -> np.ndarray:
    """A random order, seeded by all of the key (a plain sum would repeat orders across passes)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
    return torch.randperm(n, generator=generator).numpy()
