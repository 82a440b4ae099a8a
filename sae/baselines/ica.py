"""Independent component analysis: symmetric FastICA over streamed rows."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sae.baselines.linear import LinearCode
from sae.baselines.rows import mini_batches, require_several_passes
from sae.errors import InputError
from sae.ops.group import ALONE, Group
from sae.ops.moments import Moments

_ROWS = 4096
# Eigenvalues below this share of the largest count as zero, as do those below what rounding leaves of a large
# mean in float64.
_FLOOR, _ROUNDING = 1e-10, 1e-14
# E[log cosh] of a standard Gaussian.
_GAUSSIAN = 0.374567207491438


class ICA(LinearCode):
    """Sources as independent as a linear map can make them: x = mean + latents @ directions.

    Rows are whitened on their first n_latents principal components; then a rotation is sought under which
    every source is as far from a Gaussian as can be, in E[log cosh]. A step of the fixed-point iteration is
    one pass over the rows, so memory does not grow with them: w+ = E[z tanh(w z)] - E[1 - tanh²(w z)] w for
    all rows w of the rotation at once, then (W Wᵀ)^(-1/2) W. Rows are centred and whitened in float64, for
    the variances of a residual stream lie many digits apart; the products on whitened rows, all of unit
    variance, are in the baseline's own dtype, and their sums in float64.

    Directions are rows of the mixing matrix (what x is made of, not what it is multiplied with), by falling
    negentropy of their sources, each with the sign that gives its source a positive skew. Sources that are
    Gaussian have no direction of their own: any rotation among them is as good.

    References:
        "Fast and robust fixed-point algorithms for independent component analysis", Hyvärinen, 1999.
    """

    negentropy: Tensor

    def __init__(
        self,
        d_model: int,
        n_latents: int | None = None,
        passes: int = 200,
        tolerance: float = 1e-4,
        seed: int = 0,
    ) -> None:
        """Makes an unfitted analysis.

        Args:
            d_model: Width of a row.
            n_latents: Sources, among the first so many principal components; all d_model when left out.
            passes: The most passes over the rows, one for each iteration.
            tolerance: 1 - |cos| between a row of the rotation and the same one before at which the fit ends.
            seed: Of the rotation to start from.
        """
        super().__init__(d_model, d_model if n_latents is None else n_latents)
        if self.n_latents > d_model:
            raise InputError(
                f"`n_latents` must be in [1, d_model={d_model}], got n_latents={n_latents}; rows have no "
                "more independent sources than dimensions. DictionaryLearning finds more directions."
            )
        for name, value, least in (("passes", passes, 1), ("tolerance", tolerance, 0)):
            if value < least:
                raise InputError(f"`{name}` must be at least {least}, got {name}={value}.")
        self.passes, self.tolerance, self.seed = passes, tolerance, seed
        self.register_buffer("negentropy", torch.zeros(self.n_latents))

    @property
    def inference(self) -> str:
        """All sources, signs kept."""
        return "latents = pre_acts, where pre_acts = x @ W_enc + b_enc; x_hat = latents @ W_dec + b_dec"

    @property
    def config(self) -> dict[str, Any]:
        """Constructor's arguments."""
        return {name: getattr(self, name) for name in ("d_model", "n_latents", "passes", "tolerance", "seed")}

    @torch.no_grad()
    def fit(self, batches: Iterable[Tensor], moments: Moments, group: Group = ALONE) -> ICA:
        """Finds the sources; warns where `passes` ends it before `tolerance` does. Ranks share every pass.

        Raises:
            InputError: if the rows span fewer than n_latents dimensions.
        """
        self._start_fit(moments)
        require_several_passes(batches)
        vectors, deviations = _principal(moments, self.n_latents)
        vectors, deviations = vectors.to(self.mean.device), deviations.to(self.mean.device)
        rows = _Whitened(batches, moments, vectors / deviations, self.mean, group)
        rotation = self._rotation(rows)
        skew, negentropy = rows.shape_of_sources(rotation)
        order = negentropy.argsort(descending=True, stable=True)
        rotation = torch.where(skew < 0, -1.0, 1.0)[order, None] * rotation[order]
        mixing = rotation @ (vectors * deviations).T
        lengths = mixing.norm(dim=1)
        self.components.copy_(mixing / lengths[:, None])
        self.unmixing.copy_((vectors / deviations) @ rotation.T * lengths)
        self.negentropy.copy_(negentropy[order])
        group.of_first_(self.components, self.unmixing, self.negentropy)  # other machines may round otherwise
        self.fitted.fill_(True)
        return self

    def saved_tensors(self) -> dict[str, Tensor]:
        """One affine map in raw units, unit directions, the mean, and the negentropy of every source."""
        return {**super().saved_tensors(), "negentropy": self.negentropy.clone()}

    @torch.no_grad()
    def load_saved_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes W_enc, W_dec, b_dec and negentropy; b_enc follows from them."""
        self._load(tensors, unmixing="W_enc", components="W_dec", mean="b_dec", negentropy="negentropy")

    def _rotation(self, rows: _Whitened) -> Tensor:
        """The fixed point of the iteration."""
        generator = torch.Generator().manual_seed(self.seed)
        start = torch.randn(self.n_latents, self.n_latents, generator=generator, dtype=torch.float64)
        rotation = _orthogonal(start).to(self.mean.device)
        rows.group.of_first_(rotation)
        moved = rotation.new_tensor(torch.inf)
        for _ in range(self.passes):
            before, rotation = rotation, _orthogonal(rows.towards_sources(rotation))
            moved = (1 - (rotation * before).sum(1).abs()).max()
            rows.group.of_first_(rotation, moved)
            if moved < self.tolerance:
                return rotation
        warnings.warn(
            f"ICA stopped after passes={self.passes}: the last one turned a direction by 1 - |cos| = "
            f"{moved:.2g}, tolerance={self.tolerance:g}; raise `passes`, lower `n_latents`, or take it that "
            "some sources are all but Gaussian.",
            stacklevel=4,  # past fit and the wrapper of no_grad
        )
        return rotation


class _Whitened:
    """The rows with uncorrelated coordinates of unit variance, mini-batch after mini-batch."""

    def __init__(
        self, batches: Iterable[Tensor], moments: Moments, whitening: Tensor, like: Tensor, group: Group
    ) -> None:
        self._batches, self._whitening, self._like, self.group = batches, whitening, like, group
        self._mean = moments.mean.to(like.device)

    def __iter__(self) -> Iterator[Tensor]:
        for rows in mini_batches(self._batches, _ROWS, self._like):
            yield ((self.group.share(rows).double() - self._mean) @ self._whitening).to(self._like.dtype)

    def towards_sources(self, rotation: Tensor) -> Tensor:
        """E[tanh(y) z] - E[1 - tanh²(y)] w for y = w z and every row w of the rotation."""
        weights = rotation.to(self._like.dtype)
        products, slopes = torch.zeros_like(rotation), rotation.new_zeros(len(rotation))
        n_rows = rotation.new_zeros(())
        for z in self:
            bent = (z @ weights.T).tanh_()
            products += bent.T @ z
            slopes += len(z) - bent.square_().sum(0, dtype=torch.float64)
            n_rows += len(z)
        self.group.sum_(products, slopes, n_rows)
        return (products - slopes[:, None] * rotation) / n_rows

    def shape_of_sources(self, rotation: Tensor) -> tuple[Tensor, Tensor]:
        """Skew and negentropy (E[log cosh y] against that of a Gaussian, squared) of every source."""
        sums = rotation.new_zeros(2, len(rotation))
        n_rows = rotation.new_zeros(())
        for z in self:
            y = z.double() @ rotation.T
            size = y.abs()
            log_cosh = size + F.softplus(-2 * size) - math.log(2)
            sums += torch.stack([(y**3).sum(0), log_cosh.sum(0)])
            n_rows += len(z)
        self.group.sum_(sums, n_rows)
        skew, contrast = sums / n_rows
        return skew, (contrast - _GAUSSIAN).square()


def _principal(moments: Moments, n_latents: int) -> tuple[Tensor, Tensor]:
    """Principal directions (d_model, n_latents) and standard deviations, by falling variance, in float64."""
    variances, vectors = torch.linalg.eigh(moments.covariance)
    floor = max(_FLOOR * variances[-1].item(), _ROUNDING * moments.mean_squared_norm)
    rank = int((variances > floor).sum())
    if rank < n_latents:
        raise InputError(
            f"`n_latents` must be at most the rank of the rows' covariance, {rank}, got "
            f"n_latents={n_latents}; make the baseline with n_latents={rank}."
        )
    return vectors.flip(1)[:, :n_latents], variances.flip(0)[:n_latents].sqrt()


def _orthogonal(matrix: Tensor) -> Tensor:
    """(W Wᵀ)^(-1/2) W: the orthogonal matrix nearest to W."""
    left, _, right = torch.linalg.svd(matrix)
    return left @ right
