"""Principal component analysis, exact from streamed second moments."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from sae.baselines.base import Baseline
from sae.errors import InputError
from sae.ops.group import ALONE, Group
from sae.ops.moments import Moments
from sae.ops.pursuit import largest_codes
from sae.ops.sparse import SparseLatents


class PCA(Baseline):
    """The orthonormal basis whose first r rows reconstruct the rows best, for every r at once.

    latents = (x - mean) @ components.T, sorted by falling variance. The components are the
    eigenvectors of the covariance in float64, each with its largest coordinate positive, so the same
    data gives the same basis. Dense codes use all components; `sparse_code` keeps the k largest of
    a row, which is the k-term code with the least error, the basis being orthonormal.

    References:
        "On Lines and Planes of Closest Fit to Systems of Points in Space", Pearson, 1901.
    """

    components: Tensor
    variances: Tensor

    def __init__(self, d_model: int, n_latents: int | None = None) -> None:
        """Makes an unfitted basis.

        Args:
            d_model: Width of a row.
            n_latents: Components kept, the first ones; all d_model when left out.
        """
        super().__init__(d_model, d_model if n_latents is None else n_latents)
        if self.n_latents > d_model:
            raise InputError(
                f"`n_latents` must be in [1, d_model={d_model}], got n_latents={n_latents}; "
                "a basis has no more components than the data has dimensions."
            )
        self.register_buffer("components", torch.zeros(self.n_latents, d_model))
        self.register_buffer("variances", torch.zeros(d_model))

    @property
    def inference(self) -> str:
        """All projections, signs kept."""
        return "latents = pre_acts, where pre_acts = x @ W_enc + b_enc; x_hat = latents @ W_dec + b_dec"

    @property
    def config(self) -> dict[str, Any]:
        """Constructor's arguments."""
        return {"d_model": self.d_model, "n_latents": self.n_latents}

    @property
    def directions(self) -> Float[Tensor, "n_latents d_model"]:
        """The components, by falling variance."""
        self._require_fit()
        return self.components

    @torch.no_grad()
    def fit(self, batches: Iterable[Tensor], moments: Moments, group: Group = ALONE) -> PCA:
        """Takes the basis from `moments` alone; the rows need not be read again."""
        self._start_fit(moments)
        variances, vectors = torch.linalg.eigh(moments.covariance)
        rows = vectors.T.flip(0)
        largest = rows.gather(1, rows.abs().argmax(dim=1, keepdim=True))
        self.components.copy_((rows * largest.sign())[: self.n_latents])
        # Rounding can leave an eigenvalue of a flat direction just below zero.
        self.variances.copy_(variances.flip(0).clamp(min=0))
        group.of_first_(self.components, self.variances)  # other machines may round otherwise
        self.fitted.fill_(True)
        return self

    def encode(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... n_latents"]:
        """(x - mean) @ components.T: centred first, so a large mean costs no digits."""
        return self._centred(x) @ self.components.T

    def sparse_code(self, x: Float[Tensor, "rows d_model"], k: int) -> SparseLatents:
        """The k projections of every row that are largest in magnitude."""
        return largest_codes(self.encode(x), min(k, self.n_latents))

    def fvu_by_rank(self) -> Float64[Tensor, " ranks"]:
        """Fraction of variance unexplained on the fitted rows by the first r components, r = 0 .. d_model."""
        self._require_fit()
        left = self.variances.double().flip(0).cumsum(0).flip(0)
        return torch.cat([left, left.new_zeros(1)]) / left[0]

    def saved_tensors(self) -> dict[str, Tensor]:
        """The basis as one affine map in raw units, and the variance of all d_model components."""
        self._require_fit()
        offset = -(self.components.double() @ self.mean.double())
        return {
            "W_enc": self.components.T.contiguous(),
            "W_dec": self.components.clone(),
            "b_enc": offset.to(self.mean.dtype),
            "b_dec": self.mean.clone(),
            "variances": self.variances.clone(),
        }

    @torch.no_grad()
    def load_saved_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes W_dec, b_dec and variances; W_enc and b_enc follow from them."""
        self._load(tensors, components="W_dec", mean="b_dec", variances="variances")
