"""Sums of weighted rows, products with rows, the largest of rows, a sort by latent: `rows.c`, for tensors.

All in float32. Every number is made by one thread in one order: how many threads there are changes nothing.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.profiler import record_function

from sae.errors import InputError
from sae.ops.kernels.build import built


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled functions.

    Raises:
        NotBuilt: where they cannot be compiled.
    """
    return built(Path(__file__).with_name("rows.c"))


def sum_rows(
    weights: Float[Tensor, " entries"],
    indices: Int[Tensor, " entries"],
    offsets: Int[Tensor, " bags_and_end"],
    matrix: Float[Tensor, "rows width"],
) -> Float[Tensor, "bags width"]:
    """Of each bag the sum of weights[e] * matrix[indices[e]], e from offsets[bag] to offsets[bag + 1]."""
    out = matrix.new_empty(len(offsets) - 1, matrix.shape[1])
    failed = _call("sum_rows", len(out), *matrix.shape, offsets, indices, weights, matrix, out)
    _check(failed, len(matrix))
    return out


def products(
    left: Float[Tensor, "rows width"],
    indices: Int[Tensor, " entries"],
    offsets: Int[Tensor, " rows_and_end"],
    right: Float[Tensor, "n_right width"],
) -> Float[Tensor, " entries"]:
    """For each entry of a row left[row] . right[indices[e]]."""
    out = left.new_empty(len(indices))
    failed = _call("products", len(left), *right.shape, offsets, indices, left, right, out)
    _check(failed, len(right))
    return out


def largest(
    matrix: Float[Tensor, "rows width"], k: int
) -> tuple[Float[Tensor, "rows k"], Int[Tensor, "rows k"]]:
    """The k largest numbers of each row and their columns, 0 < k <= width; of equal numbers any."""
    n_rows, width = matrix.shape
    values, columns = matrix.new_empty(n_rows, k), matrix.new_empty(n_rows, k, dtype=torch.int64)
    if _call("largest", n_rows, width, k, matrix, values, columns):
        raise MemoryError(f"there is no memory to choose among {width:,} numbers.")
    return values, columns


def by_latent(
    indices: Int[Tensor, " entries"], row_offsets: Int[Tensor, " rows_and_end"], n_latents: int
) -> tuple[Int[Tensor, " entries"], Int[Tensor, " entries"], Int[Tensor, " latents_and_end"]]:
    """The places of a code's entries in the order of their latents, their rows, and each latent's offset."""
    order, rows = torch.empty_like(indices), torch.empty_like(indices)
    offsets = indices.new_empty(n_latents + 1)
    failed = _call("by_latent", len(row_offsets) - 1, n_latents, row_offsets, indices, order, rows, offsets)
    _check(failed, n_latents)
    return order, rows, offsets


def adam_rows(
    weights: Float[Tensor, "rows width"],
    gradient: Float[Tensor, "rows width"],
    first: Float[Tensor, "rows width"],
    second: Float[Tensor, "rows width"],
    steps: float,
    lr: float,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """Adam's step number `steps`, from 1, in place, on the rows whose gradient is not all zeros.

    All but the gradient must be contiguous.
    """
    bias1, bias2 = (1 - beta**steps for beta in betas)
    moments = (first, second)
    _call("adam_rows", *weights.shape, weights, gradient, *moments, lr / bias1, bias2**-0.5, *betas, eps)


def _call(name: str, *arguments: int | float | Tensor) -> int:
    # Names keep what is contiguous alive until the function returns.
    given = [a.contiguous() if isinstance(a, Tensor) else a for a in arguments]
    with record_function(f"sae::{name}"):  # for profiles
        return getattr(library(), name)(*map(_sent, given), ctypes.c_int(torch.get_num_threads()))


def _sent(argument: int | float | Tensor) -> Any:
    if isinstance(argument, Tensor):
        if argument.dtype not in (torch.float32, torch.int64):
            raise TypeError(f"the kernels take float32 and int64, got {argument.dtype}.")
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_int64(argument) if isinstance(argument, int) else ctypes.c_float(argument)


def _check(failed: int, n: int) -> None:
    if failed:
        raise InputError(
            f"`indices` must be in [0, {n:,}), and some are not: is this another dictionary's code?"
        )
