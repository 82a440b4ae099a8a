"""Baselines whose dense code is one affine map: what independent components and random directions share."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from sae.baselines.base import Baseline
from sae.ops.pursuit import orthogonal_pursuit
from sae.ops.sparse import SparseLatents, from_dense


class LinearCode(Baseline):
    """latents = (x - mean) @ unmixing, `unmixing` being the pseudo-inverse of the directions.

    That is the least-squares code with all directions, the shortest one where there are several. A code of
    k entries is found by orthogonal matching pursuit on the directions.
    """

    components: Tensor
    unmixing: Tensor

    def __init__(self, d_model: int, n_latents: int) -> None:
        super().__init__(d_model, n_latents)
        self.register_buffer("components", torch.zeros(n_latents, d_model))
        self.register_buffer("unmixing", torch.zeros(d_model, n_latents))

    @property
    def directions(self) -> Float[Tensor, "n_latents d_model"]:
        """What x is made of, as unit rows."""
        self._require_fit()
        return self.components

    def encode(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... n_latents"]:
        """(x - mean) @ unmixing: centred first, so a large mean costs no digits."""
        return self._centred(x) @ self.unmixing

    def sparse_code(self, x: Float[Tensor, "rows d_model"], k: int) -> SparseLatents:
        """Orthogonal matching pursuit of x - mean; where k allows all directions, the least-squares code."""
        if k >= self.n_latents:
            return from_dense(self.encode(x))
        return orthogonal_pursuit(self._centred(x), self.directions, k)

    def saved_tensors(self) -> dict[str, Tensor]:
        """The code as one affine map in raw units, unit directions and the mean."""
        self._require_fit()
        offset = -(self.mean.double() @ self.unmixing.double())
        return {
            "W_enc": self.unmixing.clone(),
            "W_dec": self.components.clone(),
            "b_enc": offset.to(self.mean.dtype),
            "b_dec": self.mean.clone(),
        }

    @torch.no_grad()
    def load_saved_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes W_enc, W_dec and b_dec; b_enc follows from them."""
        self._load(tensors, unmixing="W_enc", components="W_dec", mean="b_dec")


def pseudo_inverse(directions: Float[Tensor, "n_latents d_model"]) -> Float[Tensor, "d_model n_latents"]:
    """The pseudo-inverse, in float64 by the smaller of the two Gram matrices.

    Directions of which one is all but a combination of the others (singular values below about 1e-7 of the
    largest) count as dependent.
    """
    exact = directions.double()
    if len(exact) <= exact.shape[1]:
        return exact.T @ torch.linalg.pinv(exact @ exact.T, hermitian=True)
    return torch.linalg.pinv(exact.T @ exact, hermitian=True) @ exact.T
