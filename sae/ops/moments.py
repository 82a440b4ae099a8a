"""First and second moments of any number of rows, gathered in one pass in float64."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from sae.errors import InputError

# Rows turned to float64 at a time: bounds the copy at a few tens of MiB for any batch.
_CHUNK = 4096


class Moments(NamedTuple):
    """What a data set of vectors looks like up to second order, exact to float64."""

    count: int
    """Number of rows."""
    mean: Float64[Tensor, " d_model"]
    """Mean row."""
    second: Float64[Tensor, "d_model d_model"]
    """Mean of x xᵀ, NOT centred."""

    @property
    def covariance(self) -> Float64[Tensor, "d_model d_model"]:
        """second - mean meanᵀ: divided by count (the biased estimate), not by count - 1."""
        return self.second - torch.outer(self.mean, self.mean)

    @property
    def mean_squared_norm(self) -> float:
        """Mean of |x|²."""
        return self.second.trace().item()

    @property
    def total_variance(self) -> float:
        """Mean of |x - mean|²: what a reconstruction by the mean alone leaves."""
        return self.covariance.trace().item()


class StreamingMoments:
    """Adds up rows; `moments()` may be asked for at any time."""

    def __init__(self) -> None:
        self._count = 0
        self._sum: Tensor | None = None
        self._products: Tensor | None = None

    def add(self, rows: Float[Tensor, "rows d_model"]) -> None:
        """Takes any number of rows, none included, of any float dtype."""
        if self._sum is None or self._products is None:
            d_model = rows.shape[1]
            self._sum = rows.new_zeros(d_model, dtype=torch.float64)
            self._products = rows.new_zeros(d_model, d_model, dtype=torch.float64)
        if rows.shape[1] != len(self._sum):
            raise InputError(
                f"`rows` must have d_model={len(self._sum)} columns as the first ones had, "
                f"got {rows.shape[1]}; add rows of one hookpoint only."
            )
        for chunk in rows.detach().split(_CHUNK):
            exact = chunk.to(self._sum)
            self._sum += exact.sum(0)
            self._products.addmm_(exact.T, exact)
        self._count += len(rows)

    def moments(self) -> Moments:
        """The moments of all rows added so far."""
        if self._sum is None or self._products is None or self._count == 0:
            raise InputError("`moments` needs at least one row, got none; call add(rows) first.")
        if not self._products.isfinite().all():
            raise InputError("`rows` must be finite, got NaN or infinite values; leave such rows out.")
        return Moments(self._count, self._sum / self._count, self._products / self._count)
