"""Which rows make up which training batch: a pure function of seed and step."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from jaxtyping import Int
from torch import Tensor

from sae.errors import InputError

SHARDS_MIXED = 4
"""Shards whose rows are drawn from together; bounds the memory that a shuffled read touches."""


class RowsOfShard(NamedTuple):
    """Some rows of one shard and their places in the batch."""

    shard: int
    rows: Int[Tensor, " some"]
    """Rows within the shard."""
    places: Int[Tensor, " some"]
    """Where each goes in the batch."""


class _Window(NamedTuple):
    pass_index: int
    begin: int
    """Rows of the pass before it."""
    shards: list[int]
    order: Int[Tensor, " rows"]
    """Order in which the rows of its shards, laid end to end, are taken."""


class RowSampler:
    """An endless stream of rows: pass after pass, every row once per pass, each pass in a new order.

    A pass takes the shards in a random order, a few at a time, and permutes the rows of those few
    together. The batch of a step is found without going through the steps before it, which is what
    makes a run resumable at any step and a batch the same for any number of ranks.
    """

    def __init__(
        self, shard_rows: list[int], batch_size: int, seed: int, shards_mixed: int = SHARDS_MIXED
    ) -> None:
        """Prepares the stream.

        Args:
            shard_rows: rows of each shard.
            batch_size: rows per step over all ranks.
            seed: of the orders.
            shards_mixed: shards drawn from together.

        Raises:
            InputError: if a batch is larger than a pass.
        """
        self.n_rows = sum(shard_rows)
        if not 1 <= batch_size <= self.n_rows:
            raise InputError(
                f"`batch_size` must be in [1, {self.n_rows:,}], the rows of the train split, got"
                f" {batch_size}; lower it or cache more tokens."
            )
        self.batch_size = batch_size
        self._shard_rows = shard_rows
        self._seed = seed
        self._shards_mixed = shards_mixed
        self._window: _Window | None = None

    def batch(self, step: int) -> list[RowsOfShard]:
        """The rows of training step `step` (from 0)."""
        begin = step * self.batch_size
        found: list[RowsOfShard] = []
        place = 0
        while place < self.batch_size:
            window = self._window_at(*divmod(begin + place, self.n_rows))
            offset = (begin + place) % self.n_rows - window.begin
            taken = window.order[offset : offset + self.batch_size - place]
            found += self._by_shard(window.shards, taken, place)
            place += len(taken)
        return found

    def _by_shard(self, shards: list[int], taken: Tensor, place: int) -> list[RowsOfShard]:
        """Splits rows of a window, numbered over its shards laid end to end, by shard."""
        found = []
        places = torch.arange(place, place + len(taken))
        begin = 0
        for shard in shards:
            end = begin + self._shard_rows[shard]
            here = (taken >= begin) & (taken < end)
            if here.any():
                found.append(RowsOfShard(shard, taken[here] - begin, places[here]))
            begin = end
        return found

    def _window_at(self, pass_index: int, offset: int) -> _Window:
        """The window that holds the row at `offset` of a pass; the last one used is kept."""
        window = self._window
        if (
            window is None
            or window.pass_index != pass_index
            or not 0 <= offset - window.begin < len(window.order)
        ):
            window = self._window = self._make_window(pass_index, offset)
        return window

    def _make_window(self, pass_index: int, offset: int) -> _Window:
        generator = _generator(self._seed, pass_index)
        remaining = torch.randperm(len(self._shard_rows), generator=generator).tolist()
        begin = 0
        while True:
            shards, remaining = remaining[: self._shards_mixed], remaining[self._shards_mixed :]
            size = sum(self._shard_rows[shard] for shard in shards)
            if offset < begin + size:
                order = torch.randperm(size, generator=_generator(self._seed, pass_index, begin + 1))
                return _Window(pass_index, begin, shards, order)
            begin += size


def _generator(*key: int) -> torch.Generator:
    """A generator seeded by all of the key (a plain sum would repeat orders across passes)."""
    digest = hashlib.sha256(repr(key).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
