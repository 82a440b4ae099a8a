"""Worlds whose directions are known: rows planted as sparse sums of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae.errors import InputError
from sae.ops.geometry import spread_directions
from sae.ops.sparse import SparseLatents, sparse_decode


class PlantedRows(NamedTuple):
    """Rows and the code that made them."""

    x: Float[Tensor, "rows d_model"]
    latents: SparseLatents

    def to(self, device: torch.device) -> PlantedRows:
        """On a device."""
        return PlantedRows(self.x.to(device), self.latents.to(device))


class PlantedWorld:
    """Unit directions, of which every row adds up a fixed number with random positive magnitudes."""

    def __init__(
        self, n_directions: int, d_model: int, active: int, max_cosine: float = 0.5, seed: int = 0
    ) -> None:
        """Plants the directions.

        Args:
            n_directions: how many; more than d_model makes superposition.
            d_model: width of the rows.
            active: directions in every row.
            max_cosine: bound on |cos| between any two directions.
            seed: of directions and rows.

        Raises:
            InputError: if `active` is out of range.
        """
        if not 1 <= active <= n_directions:
            raise InputError(f"`active` must be in [1, n_directions={n_directions}], got {active}.")
        self._generator = torch.Generator().manual_seed(seed)
        self._active = active
        self.directions = spread_directions(n_directions, d_model, max_cosine, self._generator)

    def sample(self, n_rows: int) -> PlantedRows:
        """New rows; magnitudes are uniform in [0.5, 1.5]."""
        scores = torch.rand(n_rows, len(self.directions), generator=self._generator)
        chosen = scores.topk(self._active).indices
        magnitudes = 0.5 + torch.rand(n_rows, self._active, generator=self._generator)
        offsets = torch.arange(0, chosen.numel() + 1, self._active)
        code = SparseLatents(magnitudes.flatten(), chosen.flatten(), offsets)
        return PlantedRows(sparse_decode(code, self.directions), code)
