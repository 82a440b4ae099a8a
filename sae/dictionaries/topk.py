"""TopK: the k largest pre-activations of every vector fire."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor

from sae.dictionaries.autoencoder import TrainingCode
from sae.dictionaries.linear_encoder import LinearEncoder
from sae.errors import InputError
from sae.ops.group import ALONE, Group
from sae.ops.selection import top_k
from sae.ops.sparse import SparseLatents


class TopK(LinearEncoder):
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

    def __init__(self, d_model: int, n_latents: int, k: int | None = None) -> None:
        super().__init__(d_model, n_latents)
        self.k = whole_k(k, n_latents)

    @property
    def inference(self) -> str:
        """The rule as saved."""
        return f"latents = relu(pre_acts) where pre_acts is among its row's {self.k} largest, else 0"

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return self.arguments(k=self.k)

    @property
    def entries_per_row(self) -> float:
        """Latents that training selects per row: k."""
        return float(self.k)

    def training_code(
        self, u: Float[Tensor, "rows d_model"], group: Group = ALONE, turn: Int[Tensor, " some"] | None = None
    ) -> TrainingCode:
        """The k largest of every row; a latent whose turn it is goes first in the row it likes best."""
        v = self.encoder_input(u)
        k = min(self.n_latents, max(1, round(self.k * self.l0_factor)))
        selected = self.select(v, lambda rows, first: top_k(rows, k, first), self.forced(v, turn, group))
        return TrainingCode(selected._replace(values=selected.values.relu()), v)

    def dead_pre_acts(self, code: TrainingCode, dead: Int[Tensor, " dead"]) -> Float[Tensor, "rows dead"]:
        """Their pre-activations less the smallest that fires in the row, and that by more than rounding."""
        needed = code.latents.values.detach().view(len(code.inputs), -1).amin(1, keepdim=True)
        return super().dead_pre_acts(code, dead) - 0.999 * needed

    def encode_normalised(self, u: Float[Tensor, "rows d_model"]) -> SparseLatents:
        """The k largest, rectified."""
        selected = self.select(self.encoder_input(u), lambda rows, _: top_k(rows, self.k))
        return selected._replace(values=selected.values.relu())

    def _take_own(self, tensors: Mapping[str, Tensor], norms: Tensor) -> None:
        if norms.max() > 1.001 * norms.min():
            raise InputError(
                f"`W_dec` must have rows of one norm, got {norms.min():.4g} to {norms.max():.4g}: to"
                " bring them to norm one would change which pre-activations are among the k largest."
            )
        super()._take_own(tensors, norms)


def whole_k(k: int | float | None, n_latents: int) -> int:
    """`checked_k` of kinds that choose row by row: a whole number.

    Raises:
        InputError: if it is none.
    """
    k = checked_k(k, n_latents)
    if k != int(k):
        raise InputError(f"`k` must be a whole number for a kind that chooses row by row, got k={k}.")
    return int(k)


def checked_k(k: int | float | None, n_latents: int) -> int | float:
    """K as given.

    Raises:
        InputError: unless 0 < k <= n_latents, and at least 1 where it counts latents of one row.
    """
    if k is None:
        raise InputError("`k` must be given, the latents per row; or `model.target_l0`: a number, or auto.")
    if isinstance(k, bool) or not isinstance(k, (int, float)):
        raise InputError(f"`k` must be a number of latents, got {k!r}.")
    if not (k <= n_latents and (k >= 1 if isinstance(k, int) else k > 0)):
        raise InputError(f"`k` must be in [1, n_latents={n_latents}], got k={k}; lower k or raise n_latents.")
    return k
