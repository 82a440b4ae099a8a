"""Numbers of a step on the host: at once on a CPU, one step late on a GPU, which then need not wait."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor


class HostReading:
    """Hands out each step's numbers in turn.

    On a GPU the copy of a step is read when the next step has been queued: by then it is long there, and the
    GPU has work while the host looks. Every rank reads the same numbers at the same step.
    """

    def __init__(self, late: bool) -> None:
        self._late = late
        self._waiting: tuple[int, Tensor, torch.cuda.Event | None] | None = None

    def of(self, step: int, numbers: Float[Tensor, " n"]) -> tuple[int, list[float]] | None:
        """Takes a step's numbers; gives the step and the numbers that can be read now, if any can."""
        if not self._late:
            return step, numbers.tolist()
        before, self._waiting = self.last(), (step, *_copy(numbers))
        return before

    def last(self) -> tuple[int, list[float]] | None:
        """What is still to be read; waits for it."""
        if self._waiting is None:
            return None
        (step, copy, event), self._waiting = self._waiting, None
        if event is not None:
            event.synchronize()
        return step, copy.tolist()


def _copy(numbers: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    if numbers.device.type != "cuda":
        return numbers.clone(), None
    copy = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
    copy.copy_(numbers, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return copy, event
