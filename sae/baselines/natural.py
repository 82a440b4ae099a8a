"""The coordinates themselves as directions, and how far they stand out from rotated ones."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor

from sae.baselines.base import Baseline
from sae.baselines.rows import mini_batches
from sae.ops.group import ALONE, Group
from sae.ops.moments import Moments
from sae.ops.pursuit import largest_codes
from sae.ops.sparse import SparseLatents

KURTOSIS_AT = tuple(i / 20 for i in range(21))
"""Shares of the coordinates, by rising kurtosis, at which it is told: from the least to the most."""
ROTATIONS = 4
"""Random ones that the coordinates are held against: 4 d_model coordinates from nowhere in particular."""
_ROWS = 4096
# A standard deviation below this share of a coordinate's mean is rounding: the coordinate does not vary.
_CONSTANT = 1e-12


class NaturalBasis(Baseline):
    """latents = x - mean: every coordinate of the stream is a direction, and a code keeps the k largest.

    Nothing in the arithmetic of a residual stream but layer norm's mean and the optimiser's
    per-coordinate steps tells one orthonormal basis from another. Whether training has used that is seen in
    the tails: `kurtosis` holds the excess kurtosis of every coordinate (0 for a Gaussian, 0 also where a
    coordinate never varies), `kurtosis_rotated` that of the d_model coordinates of the same rows under each
    of `ROTATIONS` random rotations, the control. Both agree where no basis is singled out.

    References:
        "Privileged Bases in the Transformer Residual Stream", Elhage, Lasenby & Olah, 2023 (kurtosis against
        rotations, and Adam as the cause).
    """

    revision = 2  # several rotations

    kurtosis: Tensor
    kurtosis_rotated: Tensor

    def __init__(self, d_model: int, seed: int = 0) -> None:
        """Makes an unfitted basis.

        Args:
            d_model: Width of a row.
            seed: Of the rotations.
        """
        super().__init__(d_model, d_model)
        self.seed = seed
        self.register_buffer("kurtosis", torch.zeros(d_model))
        self.register_buffer("kurtosis_rotated", torch.zeros(ROTATIONS, d_model))

    @property
    def inference(self) -> str:
        """All coordinates about the mean, signs kept."""
        return "latents = pre_acts, where pre_acts = x @ W_enc + b_enc; x_hat = latents @ W_dec + b_dec"

    @property
    def config(self) -> dict[str, Any]:
        """Constructor's arguments."""
        return {"d_model": self.d_model, "seed": self.seed}

    @property
    def directions(self) -> Float[Tensor, "n_latents d_model"]:
        """The identity."""
        self._require_fit()
        return torch.eye(self.d_model, dtype=self.mean.dtype, device=self.mean.device)

    @torch.no_grad()
    def fit(self, batches: Iterable[Tensor], moments: Moments, group: Group = ALONE) -> NaturalBasis:
        """Gathers both kurtoses in one pass, in float64; ranks share every mini-batch."""
        self._start_fit(moments)
        device = self.mean.device
        mean = moments.mean.to(device)
        rotations = random_rotations(self.d_model, self.seed).to(device)
        sums = torch.zeros(1 + ROTATIONS, 4, self.d_model, dtype=torch.float64, device=device)
        n_rows = 0
        for rows in mini_batches(batches, _ROWS, self.mean):
            n_rows += len(rows)
            centred = group.share(rows).double() - mean
            views = chain([centred], (centred @ rotation for rotation in rotations))
            for side, seen in zip(sums, views, strict=True):
                square = seen.square()
                powers = seen, square, square * seen, square * square
                side += torch.stack([power.sum(0) for power in powers])
        group.sum_(sums)
        kurtosis = excess_kurtosis(sums / n_rows, torch.cat([mean[None], mean @ rotations]))
        self.kurtosis.copy_(kurtosis[0])
        self.kurtosis_rotated.copy_(kurtosis[1:])
        group.of_first_(self.kurtosis, self.kurtosis_rotated)  # other machines may round otherwise
        self.fitted.fill_(True)
        return self

    def encode(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... n_latents"]:
        """X - mean."""
        return self._centred(x)

    def decode(self, latents: Float[Tensor, "... n_latents"]) -> Float[Tensor, "... d_model"]:
        """latents + mean: no product with the identity."""
        self._require_fit()
        return latents.to(self.mean.dtype) + self.mean

    def sparse_code(self, x: Float[Tensor, "rows d_model"], k: int) -> SparseLatents:
        """The k coordinates of every row that are farthest from their mean."""
        return largest_codes(self.encode(x), min(k, self.n_latents))

    def saved_tensors(self) -> dict[str, Tensor]:
        """The identity both ways, the mean, and both kurtoses."""
        return {
            "W_enc": self.directions,
            "W_dec": self.directions,
            "b_enc": -self.mean,
            "b_dec": self.mean.clone(),
            "kurtosis": self.kurtosis.clone(),
            "kurtosis_rotated": self.kurtosis_rotated.clone(),
        }

    @torch.no_grad()
    def load_saved_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes b_dec and the kurtoses."""
        self._load(tensors, mean="b_dec", kurtosis="kurtosis", kurtosis_rotated="kurtosis_rotated")


def random_rotations(width: int, seed: int) -> Float64[Tensor, "rotations width width"]:
    """`ROTATIONS` orthogonal matrices, each as likely as any other.

    References:
        "How to generate random matrices from the classical compact groups", Mezzadri, 2007,
        arXiv:math-ph/0609050 (the signs that make QR uniform).
    """
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(ROTATIONS, width, width, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(drawn)
    return q * r.diagonal(dim1=1, dim2=2).sign()[:, None]


def excess_kurtosis(
    powers: Float64[Tensor, "... 4 d_model"], about: Float64[Tensor, "... d_model"]
) -> Float64[Tensor, "... d_model"]:
    """Fourth central moment over the squared variance, less 3; 0 where nothing varies.

    Args:
        powers: Means of the first four powers of x - about.
        about: A point near the mean of x.
    """
    first, second, third, fourth = powers.unbind(-2)
    variance = second - first.square()
    fourth = fourth - 4 * first * third + 6 * first.square() * second - 3 * first**4
    varies = variance > (_CONSTANT * about).square()
    return torch.where(varies, fourth / variance.square() - 3, 0)
