"""Sums of weighted rows, and products with rows: the two things that every sparse product here is made of.

A bag is a stretch of entries; an entry names a row of a matrix and may have a weight. Decoding sums rows of
W_dec for every row of x; the gradients of W_enc and W_dec sum rows of x and of the residual for every latent.

On a CPU these are torch's own operations, on a GPU `sae.ops.kernels`, where Triton is there.
"""

from __future__ import annotations

import functools
import os
import warnings
from types import ModuleType

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

_SERVED = (torch.float32, torch.bfloat16, torch.float16)


def sum_rows(
    weights: Float[Tensor, " entries"],
    indices: Int[Tensor, " entries"],
    offsets: Int[Tensor, " bags_and_end"],
    matrix: Float[Tensor, "rows width"],
) -> Float[Tensor, "bags width"]:
    """Of each bag the sum of weights[e] * matrix[indices[e]], e from offsets[bag] to offsets[bag + 1].

    Weights are of the matrix's dtype. No tensor has a row for every entry.
    """
    kernels = _kernels_for(matrix)
    if kernels is not None:
        return kernels.sum_rows(weights, indices, offsets, matrix.contiguous())
    return F.embedding_bag(indices, matrix, offsets[:-1], mode="sum", per_sample_weights=weights)


def products(
    rows: Int[Tensor, " entries"],
    left: Float[Tensor, "n_rows width"],
    indices: Int[Tensor, " entries"],
    offsets: Int[Tensor, " rows_and_end"],
    right: Float[Tensor, "n_right width"],
) -> Float[Tensor, " entries"]:
    """For each entry left[rows[e]] . right[indices[e]]; a row's entries are the stretch that offsets say."""
    kernels = _kernels_for(left)
    if kernels is not None:
        return kernels.products(rows, left.contiguous(), indices, right.contiguous())
    # What torch itself uses for the gradient of embedding_bag's weights.
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        left, right, indices, offsets[:-1], rows, 0
    )


def _kernels_for(matrix: Tensor) -> ModuleType | None:
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if matrix.device.type != "cuda" and not interpreted:
        return None
    if matrix.dtype not in _SERVED:
        if not interpreted:
            _say_once(f"there is no kernel for {matrix.dtype}; torch's own operations are used")
        return None
    return _kernels()


@functools.cache
def _kernels() -> ModuleType | None:
    try:
        from sae.ops.kernels import bags
    except ImportError as error:
        _say_once(f"Triton is missing ({error}); torch's own operations are used, which are slower")
        return None
    return bags


@functools.cache
def _say_once(what: str) -> None:
    warnings.warn(f"sparse products: {what}.", stacklevel=3)
