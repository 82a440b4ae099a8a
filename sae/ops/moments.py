"""First and second moments of any number of rows, gathered in one pass in float64."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
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
        self._memory: tuple[Tensor, Tensor] | None = None

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
            self._add_chunk(chunk, self._sum, self._products)
        self._count += len(rows)

    def _add_chunk(self, chunk: Tensor, sums: Tensor, products: Tensor) -> None:
        if sums.device.type != "cpu":
            exact = chunk.to(sums)
            sums += exact.sum(0)
            products.addmm_(exact.T, exact)
            return
        # On a CPU memory is kept from chunk to chunk, and numpy multiplies a matrix with its own transpose
        # by a symmetric product, in half the time of a general one.
        if self._memory is None:
            self._memory = products.new_empty(_CHUNK, len(sums)), torch.empty_like(products)
        exact, square = self._memory[0][: len(chunk)].copy_(chunk), self._memory[1]
        sums += exact.sum(0)
        array = exact.numpy()
        np.matmul(array.T, array, out=square.numpy())
        products += square

    def merge(self, other: StreamingMoments) -> None:
        """Adds the rows that another one has added up."""
        if other._sum is None or other._products is None:
            return
        if self._sum is None or self._products is None:
            self._sum, self._products = torch.zeros_like(other._sum), torch.zeros_like(other._products)
        if len(self._sum) != len(other._sum):
            raise InputError(f"moments of width {len(other._sum)} cannot join those of {len(self._sum)}.")
        self._sum += other._sum.to(self._sum)
        self._products += other._products.to(self._products)
        self._count += other._count

    def state_dict(self) -> dict[str, Tensor]:
        """What has been added up, as tensors on the CPU; empty before the first row."""
        if self._sum is None or self._products is None:
            return {}
        count = torch.tensor([self._count])
        return {"count": count, "sum": self._sum.cpu(), "products": self._products.cpu()}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor]) -> StreamingMoments:
        """Continues from what `state_dict` gave."""
        found = cls()
        if state:
            found._count, found._sum, found._products = int(state["count"]), state["sum"], state["products"]
        return found

    @property
    def is_finite(self) -> bool:
        """Whether every row added was finite (a square that overflows float64 counts as infinite)."""
        return self._products is None or bool(self._products.isfinite().all())

    def moments(self) -> Moments:
        """The moments of all rows added so far."""
        if self._sum is None or self._products is None or self._count == 0:
            raise InputError("`moments` needs at least one row, got none; call add(rows) first.")
        if not self.is_finite:
            raise InputError("`rows` must be finite, got NaN or infinite values; leave such rows out.")
        return Moments(self._count, self._sum / self._count, self._products / self._count)
