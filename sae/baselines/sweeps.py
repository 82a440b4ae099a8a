"""Passes over rows in mini-batches of one size, until an objective stops falling."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float64
from torch import Tensor

from sae.errors import InputError

# An objective below this is float32 rounding.
_ROUNDING = 1e-6


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


def learn_until_settled(
    learner: Learner,
    sweep: Callable[[], Iterator[Tensor]],
    pass_rows: int,
    *,
    passes: int,
    tolerance: float,
    name: str,
) -> None:
    """Passes until one lowers the objective by less than `tolerance` of itself; warns where `passes` ends it.

    Args:
        learner: What learns.
        sweep: Begins one full pass over the mini-batches.
        pass_rows: Rows in it.
        passes: The most passes.
        tolerance: Relative fall of the objective over one pass at which it has settled.
        name: Of the factorisation, for the warning.
    """
    before, fall = torch.inf, 1.0
    for _ in range(passes):
        now = learner.learn(sweep(), pass_rows)
        fall, before = 1 - now / before, now
        if now < _ROUNDING or (learner.settled(pass_rows) and fall < tolerance):
            return
    warnings.warn(
        f"{name} stopped after passes={passes}: the last one lowered the objective by {fall:.2g} "
        f"of itself, tolerance={tolerance:g}; raise `passes`.",
        stacklevel=4,  # past fit and its wrapper of no_grad
    )
