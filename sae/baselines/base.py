"""What every baseline adds to the dictionary contract: a fit from rows, and a code of at most k entries."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from sae.dictionaries.base import Dictionary
from sae.errors import InputError
from sae.ops.group import ALONE, Group
from sae.ops.moments import Moments
from sae.ops.sparse import SparseLatents, sparse_decode


class Baseline(Dictionary):
    """A dictionary that is fitted, not trained by gradients, around the mean of the data.

    Latents are coefficients on unit `directions`, added to `mean`, so a code of k entries from a
    baseline and one from an autoencoder with l0 = k can be compared. What a fit finds lies in
    buffers: `state_dict` holds all of it.
    """

    revision: ClassVar[int] = 1
    """Of how it fits: raised when the same rows and settings come out otherwise, ending older kept fits."""

    mean: Tensor
    fitted: Tensor

    def __init__(self, d_model: int, n_latents: int) -> None:
        super().__init__(d_model, n_latents)
        self.register_buffer("mean", torch.zeros(d_model))
        self.register_buffer("fitted", torch.tensor(False))

    @abstractmethod
    def fit(self, batches: Iterable[Tensor], moments: Moments, group: Group = ALONE) -> Baseline:
        """Learns from rows.

        Args:
            batches: Rows (rows, d_model) of any float dtype, in raw units; every `iter(batches)` is
                one full pass, always in the same order.
            moments: Exact moments of the same rows.
            group: Ranks that share the work; all must call this, with the same rows. Each ends with
                what one rank would have found.
        """

    @abstractmethod
    def sparse_code(self, x: Float[Tensor, "rows d_model"], k: int) -> SparseLatents:
        """At most k coefficients a row on `directions`; a k above n_latents means all of them."""

    def decode(self, latents: Float[Tensor, "... n_latents"]) -> Float[Tensor, "... d_model"]:
        """latents @ directions + mean."""
        directions = self.directions
        return latents.to(directions.dtype) @ directions + self.mean

    def _decode_sparse(self, latents: SparseLatents) -> Float[Tensor, "rows d_model"]:
        """latents @ directions + mean, by the rows that the code names."""
        directions = self.directions
        code = latents._replace(values=latents.values.to(directions.dtype))
        return sparse_decode(code, directions) + self.mean

    @property
    def device(self) -> torch.device:
        """Where the baseline lies, fitted or not."""
        return self.mean.device

    def _start_fit(self, moments: Moments) -> None:
        """Checks the moments and takes their mean."""
        if len(moments.mean) != self.d_model:
            raise InputError(
                f"`moments` must be of d_model={self.d_model} columns, got {len(moments.mean)}; "
                f"make the baseline with d_model={len(moments.mean)}."
            )
        if not moments.total_variance > 0:
            raise InputError(
                f"`moments` must have a positive total variance, got {moments.total_variance:g} over "
                f"{moments.count} rows; fit on rows that differ."
            )
        self.mean.copy_(moments.mean)

    def _load(self, tensors: Mapping[str, Tensor], **names: str) -> None:
        """Copies saved tensors into the buffers: buffer=saved name.

        Raises:
            InputError: if one has another shape.
        """
        for buffer, name in names.items():
            own, saved = self.get_buffer(buffer), tensors[name]
            if saved.shape != own.shape:
                raise InputError(
                    f"`{name}` of a saved {type(self).__name__} must have shape {tuple(own.shape)}, got "
                    f"{tuple(saved.shape)}; it is of another revision: fit it anew."
                )
            own.copy_(saved)
        self.fitted.fill_(True)

    def _require_fit(self) -> None:
        if not self.fitted:
            raise InputError(
                f"`{type(self).__name__}` must be fitted before use, got a new one; call fit first."
            )

    def _centred(self, x: Tensor) -> Tensor:
        """X - mean, in the baseline's own dtype."""
        self._require_fit()
        if x.shape[-1] != self.d_model:
            raise InputError(f"`x` must have d_model={self.d_model} columns, got {x.shape[-1]}.")
        return x.to(self.mean.dtype) - self.mean
