"""Random directions: what a pursuit reaches on a dictionary that has learned nothing."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sae.baselines.linear import LinearCode, pseudo_inverse
from sae.ops.group import ALONE, Group
from sae.ops.moments import Moments


class RandomDirections(LinearCode):
    """Unit Gaussian rows, any number of them: the control for every learned dictionary of that size.

    Codes of k entries are found by orthogonal matching pursuit, so what a learned dictionary is better by
    is the worth of its directions, not of its code.

    References:
        "Sanity Checks for Sparse Autoencoders: Do SAEs Beat Random Baselines?", Korznikov et al., 2026,
        arXiv:2602.14111 (random and frozen parts as controls; there inside an autoencoder).
    """

    def __init__(self, d_model: int, n_latents: int, seed: int = 0) -> None:
        """Makes an unfitted set.

        Args:
            d_model: Width of a row.
            n_latents: Directions.
            seed: Of the directions.
        """
        super().__init__(d_model, n_latents)
        self.seed = seed

    @property
    def inference(self) -> str:
        """All coefficients, signs kept."""
        return (
            "latents = pre_acts, where pre_acts = x @ W_enc + b_enc and W_enc is the pseudo-inverse of "
            "W_dec; x_hat = latents @ W_dec + b_dec"
        )

    @property
    def config(self) -> dict[str, Any]:
        """Constructor's arguments."""
        return {name: getattr(self, name) for name in ("d_model", "n_latents", "seed")}

    @torch.no_grad()
    def fit(self, batches: Iterable[Tensor], moments: Moments, group: Group = ALONE) -> RandomDirections:
        """Takes the mean from `moments` and draws the directions; the rows are not read."""
        self._start_fit(moments)
        generator = torch.Generator().manual_seed(self.seed)
        drawn = torch.randn(self.n_latents, self.d_model, generator=generator, dtype=torch.float64)
        self.components.copy_(F.normalize(drawn, dim=1))
        self.unmixing.copy_(pseudo_inverse(self.components))
        group.of_first_(self.components, self.unmixing)  # other machines may round otherwise
        self.fitted.fill_(True)
        return self
