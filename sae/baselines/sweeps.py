"""Passes over rows in mini-batches of one size, until an objective stops falling."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float64
from torch import Tensor

from sae.errors import InputError

# An objective below this is float32 rounding.
ROUNDING = 1e-6


class Learner(ABC):
    """Components that get better with every pass."""

    components: Tensor

    @abstractmethod
    def learn(self, mini_batches: Iterator[Tensor], pass_rows: int) -> float:
        """One pass over `pass_rows` rows; returns the objective, a share of the rows' energy."""

    def settled(self, pass_rows: int) -> bool:
        """Whether the last pass is worth comparing with the one before."""
        return True


def check_passes(passes: int, tolerance: float) -> None:
    """Raises InputError unless passes >= 1 and tolerance >= 0."""
    for name, value, least in (("passes", passes, 1), ("tolerance", tolerance, 0)):
        if not value >= least:
            raise InputError(f"`{name}` must be at least {least}, got {name}={value}.")


def check_energy(energy: float) -> None:
    """Raises InputError unless some row is not zero, as it is factorised."""
    if not energy > 0:
        raise InputError(
            f"`batches` must hold a row other than the origin, got rows of energy {energy:g}; are they those "
            "of the `moments`?"
        )


def share_of_energy(error_and_energy: Float64[Tensor, " two"]) -> float:
    """The objective: what is left of the rows' energy, never below zero.

    Raises:
        InputError: if there is no energy.
    """
    error, energy = error_and_energy.tolist()
    check_energy(energy)
    return max(error / energy, 0.0)


class Reached(NamedTuple):
    """Where passes ended."""

    objective: float
    """Share of the rows' energy."""
    fall: float
    """Of the objective over the last pass, relative."""
    passes: int
    """How many were taken."""
    settled: bool
    """Whether it fell by less than the tolerance, rather than the passes having run out or the first of them
    having been no help."""


def learn_until_settled(
    learner: Learner,
    sweep: Callable[[], Iterator[Tensor]],
    pass_rows: int,
    *,
    passes: int,
    tolerance: float,
    first_below: float = torch.inf,
) -> Reached:
    """Passes until one lowers the objective by less than `tolerance` of itself, at most `passes`.

    Args:
        learner: What learns.
        sweep: Begins one full pass over the mini-batches.
        pass_rows: Rows in it.
        passes: The most passes, at least 1.
        tolerance: Relative fall of the objective over one pass at which it has settled.
        first_below: What the first pass's objective must be below; else there is no second.
    """
    before, fall = torch.inf, 1.0
    for taken in range(1, passes + 1):
        now = learner.learn(sweep(), pass_rows)
        fall, before = 1 - now / before, now
        if now < ROUNDING or (learner.settled(pass_rows) and fall < tolerance):
            return Reached(now, fall, taken, settled=True)
        if taken == 1 and not now < first_below:
            return Reached(now, fall, taken, settled=False)
    return Reached(before, fall, passes, settled=False)


def warn_if_unsettled(reached: Reached, tolerance: float, name: str) -> None:
    """Warns of a fit that ran out of passes; `name` says which."""
    if not reached.settled:
        warnings.warn(
            f"{name} stopped after passes={reached.passes}: the last one lowered the objective by "
            f"{reached.fall:.2g} of itself, tolerance={tolerance:g}; raise `passes`.",
            stacklevel=4,  # past fit and its wrapper of no_grad
        )
