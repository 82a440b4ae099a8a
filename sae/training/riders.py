"""Means over all ranks that ride on the gradients, so that a step needs no further collective."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class GradientRiders(nn.Module):
    """Numbers of a step, averaged over ranks and accumulated batches by the all-reduce of its gradients.

    A parameter p of zeros adds nothing to the loss as sum(p * v), and its gradient is v: what data parallel
    training averages over ranks, and accumulation over batches, is then v itself. It costs a few floats in
    a bucket that is sent anyway. No optimiser may hold the parameter.

    Example:
        >>> riders = GradientRiders(fired=2, energy=1)
        >>> riders.board(fired=torch.tensor([0.0, 3.0]), energy=torch.tensor(0.5)).backward()
        >>> riders.arrive()["fired"].tolist()
        [0.0, 3.0]
    """

    def __init__(self, **sizes: int) -> None:
        """Reserves so many numbers under each name."""
        super().__init__()
        self._sizes = sizes
        self.seats = nn.Parameter(torch.zeros(sum(sizes.values())))

    def board(self, **values: Tensor) -> Tensor:
        """Zero, to be added to the loss; its gradient carries the values (one for each name, in order)."""
        if list(values) != list(self._sizes):
            raise KeyError(f"expected {list(self._sizes)}, got {list(values)}")
        carried = torch.cat([value.detach().reshape(-1).to(self.seats.dtype) for value in values.values()])
        return (self.seats * carried.nan_to_num()).sum()

    def arrive(self) -> dict[str, Tensor]:
        """The means by name; once for each optimiser step, after its last backward pass."""
        assert self.seats.grad is not None, "nothing was boarded before this step"
        carried, self.seats.grad = self.seats.grad, None
        return dict(zip(self._sizes, carried.split(list(self._sizes.values())), strict=True))
