"""Reading a cache context by context: whole sequences of rows in text order, with their tokens.

A cache need not have a row for every token: the first position, special tokens or rows that are not finite
may be left out. `Contexts.cached` and `cached_positions` say where there is one.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae.activations.cache import ActivationCache, Shard, Split
from sae.errors import InputError


class Contexts(NamedTuple):
    """Some whole contexts of one hookpoint."""

    sequence: Int[Tensor, " sequences"]
    """Row of the cache's `token_ids`."""
    token_ids: Int[Tensor, "sequences context"]
    x: Float[Tensor, "sequences context d_model"]
    """Activations; zero where the cache has no row."""
    cached: Bool[Tensor, "sequences context"]
    """Where the cache has a row."""


def whole_contexts(
    cache: ActivationCache, split: Split, hookpoint: str, tokens_at_once: int = 8192
) -> Iterator[Contexts]:
    """All contexts of a split that have a row, shard by shard, each with its rows in text order.

    Shards are mapped, one at a time, so memory is that of one batch and of the order of one shard. Each
    shard of the train split holds contexts chosen at random, and they are visited in a fixed random
    order: the first ones of the split are a fair sample of all. Held-out contexts come in sequence order.

    Raises:
        InputError: if the cache does not know where its rows come from, or a shard is damaged.
    """
    token_ids = token_ids_of(cache)
    n_sequences, context = token_ids.shape
    for number, shard in enumerate(cache.shards(split)):
        try:
            layout = _Layout.of(shard, n_sequences, context)
            # Sorted by sequence, the first contexts of a shard would be those of the earliest documents.
            order = torch.arange(len(layout.sequence))
            if split == "train":
                order = torch.randperm(len(order), generator=torch.Generator().manual_seed(number))
            at_once = max(1, tokens_at_once // context)
            for begin in range(0, len(order), at_once):
                chosen = order[begin : begin + at_once]
                sequence = layout.sequence[chosen]
                of, position, rows = layout.rows_of(chosen)
                found = shard.x(hookpoint, rows)
                x = found.new_zeros(len(chosen), context, found.shape[1])
                x[of, position] = found
                cached = torch.zeros(len(chosen), context, dtype=torch.bool)
                cached[of, position] = True
                yield Contexts(sequence, token_ids[sequence], x, cached)
        finally:
            shard.close()


def token_ids_of(cache: ActivationCache) -> Int[Tensor, "sequences context"]:
    """The contexts of a cache, a view of the mapped file: train sequences first, then held-out ones.

    They are int32, as on disk: convert what you take of them, not the whole, which may be gigabytes.

    Raises:
        InputError: if its rows were imported without tokens, or the file is damaged.
    """
    return cache.token_ids


def held_out_token_ids(cache: ActivationCache) -> Int[Tensor, "sequences context"]:
    """The held-out contexts, a view as `token_ids_of` is."""
    return token_ids_of(cache)[_n_train(cache) :]


def cached_positions(cache: ActivationCache) -> Bool[Tensor, "sequences context"] | None:
    """At which tokens of `token_ids_of` the cache has a row, a view of the mapped file; None = at all.

    Raises:
        InputError: if the cache's rows were imported without tokens, or the file is damaged.
    """
    cached = cache.sequences("cached")
    return None if cached is None else cached.view(torch.bool)  # of uint8, the same bytes


def held_out_cached(cache: ActivationCache) -> Bool[Tensor, "sequences context"] | None:
    """At which tokens of `held_out_token_ids` the cache has a row; None = at all of them."""
    cached = cached_positions(cache)
    return None if cached is None else cached[_n_train(cache) :]


class _Layout(NamedTuple):
    """Where the rows of each context lie in a shard."""

    sequence: Int[Tensor, " sequences"]
    """The contexts that have rows, rising."""
    count: Int[Tensor, " sequences"]
    """Rows of each."""
    position: Int[Tensor, " rows"]
    """Positions of the rows, context after context, rising in each."""
    row: Int[Tensor, " rows"]
    """Places of these rows in the shard."""

    @classmethod
    def of(cls, shard: Shard, n_sequences: int, context: int) -> _Layout:
        if not (shard.has("sequence") and shard.has("position")):
            raise InputError(
                f"shard {shard.file} holds no token ids of its rows; directions cannot be read from it."
            )
        sequence, position = (shard.tensor(name).long() for name in ("sequence", "position"))
        for name, origin, end in (("sequence", sequence, n_sequences), ("position", position, context)):
            outside = origin[(origin < 0) | (origin >= end)]
            if len(outside):
                raise InputError(
                    f"shard {shard.file} is damaged: a row is of {name} {int(outside[0])}, there are {end:,};"
                    " make the cache again."
                )
        origin, row = (sequence * context + position).sort()
        twice = origin[1:][origin.diff() == 0]
        if len(twice):
            raise InputError(
                f"shard {shard.file} is damaged: it has two rows of sequence {int(twice[0]) // context},"
                f" position {int(twice[0]) % context}; make the cache again."
            )
        sequences, count = (origin // context).unique_consecutive(return_counts=True)
        return cls(sequences, count, origin % context, row)

    def rows_of(self, chosen: Int[Tensor, " chosen"]) -> tuple[Tensor, Tensor, Tensor]:
        """Of each row of the chosen contexts: the index into `chosen`, its position, its place."""
        begin, count = (self.count.cumsum(0) - self.count)[chosen], self.count[chosen]
        of = torch.arange(len(chosen)).repeat_interleave(count)
        within = torch.arange(len(of)) - (count.cumsum(0) - count)[of]
        entry = begin[of] + within
        return of, self.position[entry], self.row[entry]


def _n_train(cache: ActivationCache) -> int:
    return int(cache.manifest["splits"]["train"]["sequences"])
