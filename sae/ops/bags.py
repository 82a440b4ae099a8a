"""Sums of weighted rows, and products with rows: the two things that every sparse product here is made of.

A bag is a stretch of entries; an entry names a row of a matrix and may have a weight. Decoding sums rows of
W_dec for every row of x; the gradients of W_enc and W_dec sum rows of x and of the residual for every latent.

Kernels serve them where there are some (`sae.ops.kernels`), torch's own operations elsewhere.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from sae.ops.kernels import kernel
from sae.ops.offsets import rows_of


def sum_rows(
    weights: Float[Tensor, " entries"],
    indices: Int[Tensor, " entries"],
    offsets: Int[Tensor, " bags_and_end"],
    matrix: Float[Tensor, "rows width"],
) -> Float[Tensor, "bags width"]:
    """Of each bag the sum of weights[e] * matrix[indices[e]], e from offsets[bag] to offsets[bag + 1].

    Weights are of the matrix's dtype. No tensor has a row for every entry.
    """
    if (served := kernel("sum_rows", matrix)) is not None:
        return served(weights, indices, offsets, matrix.contiguous())
    return F.embedding_bag(indices, matrix, offsets[:-1], mode="sum", per_sample_weights=weights)


def products(
    left: Float[Tensor, "n_rows width"],
    indices: Int[Tensor, " entries"],
    offsets: Int[Tensor, " rows_and_end"],
    right: Float[Tensor, "n_right width"],
) -> Float[Tensor, " entries"]:
    """For each entry of a row left[row] . right[indices[e]]; a row's entries are those from its offset on."""
    if (served := kernel("products", left)) is not None:
        return served(left.contiguous(), indices, offsets, right.contiguous())
    rows = rows_of(offsets, len(indices))
    # What torch itself uses for the gradient of embedding_bag's weights.
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(
        left, right, indices, offsets[:-1], rows, 0
    )
