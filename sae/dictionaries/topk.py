"""TopK: the k largest pre-activations of every vector fire."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from sae.dictionaries.autoencoder import SparseAutoencoder
from sae.errors import InputError
from sae.ops.sparse import SparseLatents, top_k


class TopK(SparseAutoencoder):
    """latents = relu(the k largest of pre_acts), all others zero.

    L0 is set, not searched for, and no penalty shrinks the latents. A vector fires fewer than k when
    fewer than k pre-activations are positive.

    References:
        k-Sparse Autoencoders, Makhzani and Frey 2013, arXiv 1312.5663.
        Scaling and evaluating sparse autoencoders, Gao et al. 2024, arXiv 2406.04093.

    Example:
        >>> import torch
        >>> dictionary = TopK(d_model=8, n_latents=32, k=4)
        >>> dictionary(torch.randn(5, 8)).x_hat.shape
        torch.Size([5, 8])
    """

    def __init__(self, d_model: int, n_latents: int, k: int) -> None:
        super().__init__(d_model, n_latents)
        if not 1 <= k <= n_latents:
            raise InputError(
                f"`k` must be in [1, n_latents={n_latents}], got k={k}; lower k or raise n_latents."
            )
        self.k = k

    @property
    def inference(self) -> str:
        """The rule as saved."""
        return f"latents = relu(pre_acts) where pre_acts is among its row's {self.k} largest, else 0"

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {"d_model": self.d_model, "n_latents": self.n_latents, "k": self.k}

    def select(self, pre_acts: Float[Tensor, "rows n_latents"]) -> SparseLatents:
        """The k largest pre-activations of every row."""
        return top_k(pre_acts, self.k)
