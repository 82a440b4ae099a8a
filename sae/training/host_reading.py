"""Numbers of a step on the host: at once on a CPU, one step late on a GPU, which then need not wait."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class Moment(NamedTuple):
    """When something happened."""

    step: int
    """Optimiser steps before it."""
    batch: int
    """Batches before it, in the order of the run's seed."""


class HostReading:
    """Hands out each step's numbers in turn.

    On a GPU the copy of a step is read when the next step has been queued: by then it is long there, and the
    GPU has work while the host looks. Every rank reads the same numbers at the same step.
    """

    def __init__(self, late: bool) -> None:
        self._late = late
        self._waiting: tuple[Moment, Tensor, torch.cuda.Event | None] | None = None

    def of(self, now: Moment, numbers: Float[Tensor, " n"]) -> tuple[Moment, list[float]] | None:
        """Takes a step's numbers; gives the moment and the numbers that can be read now, if any can."""
        if not self._late:
            return now, numbers.tolist()
        before, self._waiting = self.last(), (now, *_copy(numbers))
        return before

    def last(self) -> tuple[Moment, list[float]] | None:
        """What is still to be read; waits for it."""
        if self._waiting is None:
            return None
        (then, copy, event), self._waiting = self._waiting, None
        if event is not None:
            event.synchronize()
        return then, copy.tolist()


def _copy(numbers: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    if numbers.device.type != "cuda":
        return numbers.clone(), None
    copy = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    copy.copy_(numbers, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return copy, event
