"""Which stretches of imported rows make a context each, and which of these are held out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sae.errors import InputError


@dataclass(frozen=True)
class Spans:
    """Contexts, each a stretch of rows; train contexts come first, then held-out ones."""

    begins: Int[Tensor, " sequences"]
    """First row of each."""
    lengths: Int[Tensor, " sequences"]
    """Rows of each."""
    n_train: int
    """Contexts of the train split."""
    are_sequences: bool
    """Whether they are sequences of the model; otherwise mere runs of rows, to be read in one piece."""

    @cached_property
    def context_length(self) -> int:
        """Rows of the longest."""
        return int(self.lengths.max())

    @cached_property
    def are_whole(self) -> bool:
        """Whether all are equally long."""
        return bool((self.lengths == self.lengths[0]).all())

    def cached(self) -> Bool[Tensor, "sequences context"] | None:
        """Which positions have a row, when shorter contexts are padded; None = all."""
        if self.are_whole:
            return None
        return torch.arange(self.context_length) < self.lengths[:, None]

    def rows(self, sequence: int) -> tuple[int, int]:
        """Where a context begins and ends."""
        begin = int(self.begins[sequence])
        return begin, begin + int(self.lengths[sequence])


def runs_of_rows(n_rows: int, run: int, held_out: float) -> Spans:
    """Rows of which nothing is known: runs, the last of each split shorter; the last rows are held out.

    Raises:
        InputError: if there would be no rows on one side.
    """
    n_held_out = share(n_rows, held_out, "rows")
    n_train = n_rows - n_held_out
    train, rest = _runs(n_train, run), _runs(n_held_out, run)
    lengths = torch.cat([train, rest])
    return Spans(lengths.cumsum(0) - lengths, lengths, len(train), are_sequences=False)


def sequences_of(lengths: Int[Tensor, " sequences"], held_out: float) -> Spans:
    """Sequences one after another; the last ones are held out.

    Raises:
        InputError: if there would be none on one side.
    """
    n_held_out = share(len(lengths), held_out, "sequences")
    lengths = lengths.long()
    return Spans(lengths.cumsum(0) - lengths, lengths, len(lengths) - n_held_out, are_sequences=True)


def equal_lengths(n_rows: int, context_length: int) -> Int[Tensor, " sequences"]:
    """Lengths of sequences that are all equally long, the last one shorter if it must be."""
    return _runs(n_rows, context_length)


def share(n: int, held_out: float, what: str) -> int:
    """How many of n are held out.

    Raises:
        InputError: if none would be left on one side.
    """
    if not 0 < held_out < 1:
        raise InputError(f"`held_out` must lie between 0 and 1, got {held_out}.")
    n_held_out = round(n * held_out)
    if not 0 < n_held_out < n:
        side = "held-out" if n_held_out == 0 else "train"
        raise InputError(f"`held_out`={held_out} leaves no {side} {what}: there are {n:,}; change it.")
    return n_held_out


def _runs(n_rows: int, run: int) -> Tensor:
    lengths = torch.full((-(-n_rows // run),), run)
    lengths[-1] = n_rows - run * (len(lengths) - 1)
    return lengths
