"""Times of things done in turn, so that what else the machine does falls on all alike."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch

Times = dict[str, list[float]]


def in_turn(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    device: str,
    at_least: float = 0.2,
    between: Callable[[], None] | None = None,
) -> Times:
    """Seconds per call of each, one number for every round; a first round warms up and is left out.

    Args:
        calls: by name.
        rounds: how often all of them have their turn.
        device: waited for before and after.
        at_least: seconds that a turn lasts, in as many calls as it takes.
        between: done before every turn, untimed.
    """
    times: Times = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            if between is not None:
                between()
            if turn == 0:
                call()
                call()  # what is kept from call to call is there from the second on
            synchronise(device)
            begin, n = time.perf_counter(), 0
            while n == 0 or (turn > 0 and time.perf_counter() - begin < at_least):
                call()
                n += 1
                if n % 4 == 0:
                    synchronise(device)
            synchronise(device)
            if turn > 0:
                times[name].append((time.perf_counter() - begin) / n)
    return times


def ratio(times: Times, numerator: str, denominator: str) -> dict[str, float]:
    """Seconds of one over those of another, round by round: the median and the range."""
    return summary([a / b for a, b in zip(times[numerator], times[denominator], strict=True)])


def summary(values: list[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def synchronise(device: str) -> None:
    """Waits for what a GPU still has to do."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()
