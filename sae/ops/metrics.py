"""How well a code reconstructs held-out rows: sums over batches first, division at the end."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64
from torch import Tensor
from torch.nn import functional as F

from sae.errors import InputError
from sae.ops.group import Group
from sae.ops.sparse import SparseLatents


class ReconstructionScores(NamedTuple):
    """Scores over all rows added; None where they have no meaning."""

    fvu: float | None
    """Residual sum of squares over the sum of squares about the mean of the same rows."""
    fvu_without_first_position: float | None
    """The same over the rows that do not open a context, where many models put an outlier."""
    fvu_median: float
    """Median over rows of |x - x_hat|^2 over |x - mean|^2, the mean being that of the training rows."""
    l0: float
    """Mean number of latents that fire per row."""
    dead_fraction: float
    """Share of latents that fired on no row."""
    cosine: float
    """Mean cosine between x and x_hat."""


class ReconstructionMetrics:
    """Accumulates `ReconstructionScores` batch by batch, in float64, on the device of the batches.

    Predicting the mean of the rows scores an FVU of 1, a perfect copy scores 0. Memory: one number
    per row and one per latent, whatever d_model.
    """

    def __init__(self, n_latents: int, mean: Float[Tensor, " d_model"]) -> None:
        """Starts empty.

        Args:
            n_latents: width of the codes to come.
            mean: mean of the training rows; sums are kept about it, so that a large mean costs no
                digits, and `fvu_median` measures distances from it.
        """
        self._mean = mean.double()
        self._all = _SumsOfSquares()
        self._later_positions = _SumsOfSquares()
        self._positions_known = True
        self._firings = torch.zeros(n_latents, dtype=torch.int64)
        self._active: Tensor | int = 0
        self._cosine: Tensor | float = 0.0
        self._relative: list[Tensor] = []

    def add(
        self,
        x: Float[Tensor, "rows d_model"],
        x_hat: Float[Tensor, "rows d_model"],
        latents: SparseLatents,
        first_position: Bool[Tensor, " rows"] | None,
    ) -> None:
        """Adds a batch.

        Args:
            x: the rows, raw units.
            x_hat: their reconstructions.
            latents: the codes; entries equal to zero do not count as firing.
            first_position: which rows open a context; None where positions are not known.
        """
        x, x_hat = x.double(), x_hat.double()
        centred = x - self._mean.to(x.device)
        residual = (x - x_hat).square().sum(-1)
        self._relative.append(residual / centred.square().sum(-1).clamp_min(1e-30))
        self._all.add(centred, residual)
        if first_position is None:
            self._positions_known = False
        else:
            self._later_positions.add(centred[~first_position], residual[~first_position])
        firing = latents.values != 0
        counts = torch.bincount(latents.indices[firing], minlength=len(self._firings))
        self._firings = self._firings.to(x.device) + counts
        self._active = self._active + firing.sum()
        self._cosine = self._cosine + F.cosine_similarity(x, x_hat, dim=-1).sum()

    def merge(self, group: Group) -> None:
        """Adds what the other ranks of a group have: then each has the scores of all rows.

        Every rank must have added at least one batch, if only of no rows.
        """
        if group.world == 1:
            return
        self._relative = [group.gather(torch.cat(self._relative))]
        self._firings = self._firings.contiguous()
        self._active, self._cosine = torch.as_tensor(self._active), torch.as_tensor(self._cosine)
        group.sum_(self._firings, self._active, self._cosine)
        self._all.merge(group)
        if self._positions_known:
            self._later_positions.merge(group)

    @property
    def densities(self) -> Float64[Tensor, " n_latents"]:
        """Share of the rows added on which each latent fired.

        Raises:
            InputError: if no row was added.
        """
        if self._all.count == 0:
            raise InputError("no held-out rows to score; raise `held_out` or `n_tokens`.")
        return self._firings.double() / self._all.count

    def compute(self) -> ReconstructionScores:
        """The scores of everything added so far.

        Raises:
            InputError: if no row was added.
        """
        densities, rows = self.densities, self._all.count
        return ReconstructionScores(
            fvu=self._all.fvu(),
            fvu_without_first_position=self._later_positions.fvu() if self._positions_known else None,
            fvu_median=float(torch.cat(self._relative).median()),
            l0=float(self._active) / rows,
            dead_fraction=float((densities == 0).double().mean()),
            cosine=float(self._cosine) / rows,
        )


class _SumsOfSquares:
    """Residual and total sums of squares of the rows added."""

    def __init__(self) -> None:
        self.count = 0
        self._sum: Tensor | float = 0.0
        self._squares: Tensor | float = 0.0
        self._residual: Tensor | float = 0.0

    def add(self, x: Tensor, residual: Tensor) -> None:
        self.count += len(x)
        self._sum = self._sum + x.sum(0)
        self._squares = self._squares + x.square().sum()
        self._residual = self._residual + residual.sum()

    def merge(self, group: Group) -> None:
        count = torch.tensor(self.count)
        self._sum, self._squares, self._residual = (
            torch.as_tensor(sums) for sums in (self._sum, self._squares, self._residual)
        )
        group.sum_(count, self._sum, self._squares, self._residual)
        self.count = int(count)

    def fvu(self) -> float | None:
        """None where the rows do not vary, or there are none."""
        if self.count == 0:
            return None
        about_mean = float(self._squares) - float(torch.as_tensor(self._sum).square().sum()) / self.count
        return float(self._residual) / about_mean if about_mean > 0 else None
