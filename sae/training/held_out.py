"""Held-out scores of all dictionaries of a run, from one pass over the rows."""

from __future__ import annotations

import math
from collections.abc import Mapping

from jaxtyping import Float, Float64
from torch import Tensor

from sae.dictionaries import SparseAutoencoder
from sae.ops.group import Group
from sae.ops.metrics import ReconstructionMetrics, ReconstructionScores
from sae.training.rows import Rows


class HeldOut:
    """Scores by name of the dictionary; those of the last pass stay until the next one has ended."""

    def __init__(self) -> None:
        self.scores: dict[str, ReconstructionScores] = {}
        """Empty before the first pass has ended."""
        self.densities: dict[str, Float64[Tensor, " n_latents"]] = {}
        """Share of the rows on which each latent fired."""
        self._sums: dict[str, ReconstructionMetrics] = {}

    def begin(self, dictionaries: Mapping[str, SparseAutoencoder], mean: Float[Tensor, " d_model"]) -> None:
        """Empties the sums; `mean` is that of the training rows."""
        self._sums = {
            name: ReconstructionMetrics(dictionary.n_latents, mean)
            for name, dictionary in dictionaries.items()
        }

    def add(self, dictionaries: Mapping[str, SparseAutoencoder], batch: Rows) -> None:
        """Adds a batch to all of them."""
        first = None if batch.position is None else batch.position == 0
        for name, dictionary in dictionaries.items():
            x = batch.x.to(dictionary.W_dec.dtype)
            x_hat, latents = dictionary(x)
            self._sums[name].add(x, x_hat, latents, first)

    def end(self, group: Group) -> None:
        """Adds what the other ranks have, and divides."""
        for sums in self._sums.values():
            sums.merge(group)
        self.scores = {name: sums.compute() for name, sums in self._sums.items()}
        self.densities = {name: sums.densities for name, sums in self._sums.items()}

    @property
    def mean_fvu(self) -> float | None:
        """Mean over the dictionaries: what the best checkpoint is chosen by. None where it is not known."""
        known = [scores.fvu for scores in self.scores.values() if scores.fvu is not None]
        return sum(known) / len(known) if known and len(known) == len(self.scores) else None

    @property
    def diverged(self) -> str | None:
        """Name of the first whose FVU is not finite."""
        fvus = {name: scores.fvu for name, scores in self.scores.items()}
        return next((name for name, fvu in fvus.items() if fvu is not None and not math.isfinite(fvu)), None)
