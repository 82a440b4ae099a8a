"""The weight of a sparsity penalty: fixed after a rise, or moved until L0 is as asked."""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor, nn

_FURTHEST = math.log(1e6)
"""How far the level may go from its start, as a logarithm."""


class SparsityControl(nn.Module):
    """The coefficient of each step, the same on all ranks.

    With a target, the coefficient's logarithm follows the logarithm of L0 / target: by a running sum, which
    finds the level, and in proportion, which keeps it from swinging. L0 is that of the step before.

    >>> control = SparsityControl(target_l0=10.0)
    >>> before = control.coefficient(0.0)
    >>> control.update(torch.tensor(20.0))
    >>> bool(control.coefficient(0.0) > before)
    True
    """

    level: Tensor
    error: Tensor

    def __init__(
        self,
        target_l0: int | float | None = None,
        fixed: int | float | None = None,
        warms_up_for: float = 0.0,
        start: float = 0.01,
        rate: float = 0.02,
        proportional: float = 1.0,
    ) -> None:
        """Describes the control.

        Args:
            target_l0: latents per row to be reached; or
            fixed: the coefficient, when it is not to move.
            warms_up_for: share of the run over which a fixed coefficient rises from zero.
            start: coefficient to begin with, where it moves.
            rate: share of the logarithmic error that the level takes up at every step.
            proportional: how much of the error of late is added to the level.
        """
        super().__init__()
        self.target_l0, self.fixed, self.warms_up_for = target_l0, fixed, warms_up_for
        self._rate, self._proportional = rate, proportional
        self._bounds = math.log(start) - _FURTHEST, math.log(start) + _FURTHEST
        self.register_buffer("level", torch.tensor(float(start)).log())
        self.register_buffer("error", torch.zeros(()))

    def coefficient(self, progress: float) -> Float[Tensor, ""]:
        """For the next step, `progress` (0 to 1) into the run."""
        if self.fixed is not None:
            rise = min(1.0, progress / self.warms_up_for) if self.warms_up_for > 0 else 1.0
            return torch.full_like(self.level, self.fixed * rise)
        return (self.level + self._proportional * self.error).exp()

    def update(self, l0: Float[Tensor, ""], factor: float = 1.0) -> None:
        """Takes the L0 of a step, at which the target is so many times its own; NaN changes nothing."""
        if self.fixed is not None or self.target_l0 is None:
            return
        error = (l0.clamp_min(1e-3) / (self.target_l0 * factor)).log().clamp(-1.0, 1.0)
        known = ~error.isnan()
        self.error.lerp_(torch.where(known, error.to(self.error.dtype), self.error), 0.2)
        self.level += self._rate * self.error * known
        self.level.clamp_(*self._bounds)  # what cannot be reached must not wind it up
