"""Which contexts go into which shard, and how their rows lie there: a pure function of the contexts."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sae.activations.cache.format import Split

SHARD_BYTES = 256 * 2**20
"""The size of a shard, bytes, in caches of at least 4 GiB."""
SMALLEST_SHARD_BYTES = 16 * 2**20
"""Smaller caches have 16 shards or fewer, none much smaller than this."""
_ORDER_SEED = 0  # the order on disk is part of the format, not of an experiment


class PlannedShard(NamedTuple):
    """A shard that is to be written."""

    index: int
    file: str
    split: Split
    sequences: Int[Tensor, " sequences"]
    """Contexts in it, in the order they are run."""


class Layout(NamedTuple):
    """How the rows of a shard lie."""

    origin: Int[Tensor, " rows"]
    """Of each row, in the order on disk: sequence * context_length + position."""
    places: Int[Tensor, " rows"]
    """Place on disk of each row, taken context after context."""
    cached: Bool[Tensor, "sequences context"] | None
    """Which positions of its contexts have a row; None = all."""


class Plan:
    """All shards of a cache.

    Contexts of the train split are dealt to shards at random. Within a shard each context's rows are
    spread evenly from end to end, in a random order of their own: a stretch of 1/n of the shard has about
    1/n of each context's rows. Reading a stretch of several shards at once is then as good as a full
    shuffle, with a buffer of no more than these stretches. Held-out rows keep sequence order.
    """

    def __init__(
        self,
        n_train: int,
        n_held_out: int,
        context_length: int,
        contexts_per_shard: int,
        cached: Bool[Tensor, "sequences context"] | None = None,
    ) -> None:
        """Deals contexts to shards.

        Args:
            n_train: contexts of the train split; they are numbered first.
            n_held_out: contexts of the held-out split.
            context_length: positions of a context.
            contexts_per_shard: at most.
            cached: positions that have a row; None = all.
        """
        self.context_length = context_length
        self._cached = cached
        mixed = torch.randperm(n_train, generator=_generator("contexts"))
        splits: tuple[tuple[Split, Tensor], ...] = (
            ("train", mixed),
            ("held_out", torch.arange(n_train, n_train + n_held_out)),
        )
        self.shards: list[PlannedShard] = []
        for split, sequences in splits:
            for chosen in _in_equal_parts(sequences, contexts_per_shard):
                index = len(self.shards)
                self.shards.append(PlannedShard(index, f"shard-{index:05d}.safetensors", split, chosen))

    def layout(self, shard: PlannedShard) -> Layout:
        """Where the rows of a shard come from and where they lie."""
        context = self.context_length
        rows = (shard.sequences[:, None] * context + torch.arange(context)).flatten()
        counts = torch.full((len(shard.sequences),), context)
        mask = None
        if self._cached is not None:
            mask = self._cached[shard.sequences]
            rows, counts = rows[mask.flatten()], mask.sum(1)
        if shard.split == "held_out":
            return Layout(rows, torch.arange(len(rows)), mask)
        order = _evenly_spread(counts, _generator(shard.index))
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order))
        return Layout(rows[order], places, mask)

    def n_rows(self, shard: PlannedShard) -> int:
        """Rows of a shard, if none is left out for not being finite."""
        if self._cached is None:
            return len(shard.sequences) * self.context_length
        return int(self._cached[shard.sequences].sum())


def contexts_per_shard(n_contexts: int, context_length: int, bytes_per_row: int) -> int:
    """How many contexts make a shard of a good size: small caches have some shards too."""
    of_context = context_length * bytes_per_row
    aim = min(SHARD_BYTES, max(SMALLEST_SHARD_BYTES, n_contexts * of_context // 16))
    return max(1, aim // of_context)


def _in_equal_parts(sequences: Tensor, most: int) -> list[Tensor]:
    """Parts that differ by one at most, so that no shard is left much smaller than the others."""
    if not len(sequences):
        return []
    return list(sequences.tensor_split(-(-len(sequences) // most)))


def _evenly_spread(counts: Int[Tensor, " sequences"], generator: torch.Generator) -> Int[Tensor, " rows"]:
    """An order of rows, given sequence after sequence, that spreads each sequence from end to end.

    The n rows of a sequence, in random order, lie at equal distances, 1/n of the whole, from a random
    first place on. So a stretch of 1/n has one of them, were they placed at random it might have many.
    """
    first = torch.rand(len(counts), generator=generator)
    if len(counts) and (counts == counts[0]).all():  # the same, sorted by hand: a tenth of the time
        each = int(counts[0])
        lots = torch.rand(len(counts), each, generator=generator)
        rows = lots.argsort(dim=1, stable=True) + torch.arange(len(counts))[:, None] * each
        return rows[first.argsort(stable=True)].T.flatten()
    sequence = torch.arange(len(counts)).repeat_interleave(counts)
    lots = torch.rand(len(sequence), generator=generator, dtype=torch.float64)
    rank = torch.empty(len(sequence), dtype=torch.float64)
    begins = (counts.cumsum(0) - counts)[sequence]
    rank[(sequence + lots).argsort(stable=True)] = (torch.arange(len(sequence)) - begins).double()
    return ((rank + first[sequence]) / counts[sequence]).argsort(stable=True)


def _generator(key: str | int) -> torch.Generator:
    digest = hashlib.sha256(repr((_ORDER_SEED, key)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
