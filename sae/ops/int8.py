"""Rows as 8-bit integers with a scale per row, and a few coordinates apart that would spoil the scale."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, Int, Int8
from torch import Tensor

OUTLIER_RATIO = 6.0
"""A coordinate stands apart if its root mean square is this many times the median coordinate's."""
MOST_OUTLIERS = 1 / 32
"""Share of the coordinates that may stand apart."""
_LARGEST = 127


class Int8Rows(NamedTuple):
    """Rows whose coordinates are `values * scale`, but for the outlier coordinates."""

    values: Int8[Tensor, "rows d_model"]
    """Zero at the outlier coordinates."""
    scale: Float32[Tensor, " rows"]
    """Largest magnitude of a row, over 127; raw activation units."""
    outliers: Float32[Tensor, "rows outliers"]
    """The outlier coordinates as they are."""


def outlier_coordinates(sample: Float[Tensor, "rows d_model"]) -> Int[Tensor, " outliers"]:
    """Coordinates so large that a scale shared with them would round the others away; often none.

    A transformer's residual stream has a few (LLM.int8(), Dettmers et al. 2022, arXiv 2208.07339, keeps
    such columns in 16 bits): with one coordinate at 100 and the others near 1, a step of 100 / 127 leaves
    those one bit.
    """
    size = sample.float().square().mean(0).sqrt()
    most = max(1, int(size.numel() * MOST_OUTLIERS))
    apart = (size > OUTLIER_RATIO * size.median()).nonzero().squeeze(1)
    return apart[size[apart].argsort(descending=True)[:most]].sort().values


def quantise(x: Float[Tensor, "rows d_model"], outliers: Int[Tensor, " outliers"]) -> Int8Rows:
    """Rounds each row to the nearest multiple of its scale; the error is at most half a scale."""
    kept = x[:, outliers].float()
    rest = x.float()
    if len(outliers):
        rest = rest.index_fill(1, outliers, 0.0)
    scale = rest.abs().amax(1) / _LARGEST
    steps = rest / scale.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    return Int8Rows(steps.round_().clamp_(-_LARGEST, _LARGEST).to(torch.int8), scale, kept)


def dequantise(rows: Int8Rows, outliers: Int[Tensor, " outliers"]) -> Float32[Tensor, "rows d_model"]:
    """The rows again, as float32."""
    x = rows.values.float().mul_(rows.scale[:, None])
    if len(outliers):
        x[:, outliers] = rows.outliers
    return x
