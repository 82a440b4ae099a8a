"""What training needs of its data, whoever gives it."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor

from sae.ops.moments import Moments


@runtime_checkable
class Rows(Protocol):
    """A batch as the module needs it."""

    x: Tensor
    position: Tensor | None


@runtime_checkable
class RowSource(Protocol):
    """What the module needs of a datamodule."""

    batch_size: int

    @property
    def d_model(self) -> int:
        """Width of the rows."""
        ...

    @property
    def moments(self) -> Moments:
        """Mean and second moments of the training rows."""
        ...

    def first_rows(self, n: int) -> Tensor:
        """Up to n rows in raw units, (rows, d_model): always the same ones, on every rank."""
        ...
