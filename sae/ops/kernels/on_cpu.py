"""Sums of weighted rows, products with rows, the largest of rows, a sort by latent: `rows.c`, for tensors.

All in float32. Every number is made by one thread in one order: how many threads there are changes nothing.
"""

from __future__ import annotations

import ctypes
import functools
import operator
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.profiler import record_function

from sae.errors import InputError
from sae.ops.kernels.build import built

_ARGUMENTS = {
    "sum_rows": "nnniifff",
    "products": "nnniifff",
    "largest": "nnnffi",
    "by_latent": "nniiiii",
    "adam_rows": "nnffffsssssss",
}
"""Of each function in `rows.c`, but for the threads: numbers of rows and the like, pointers to int64 and to
float32, and single floats."""
_TYPES = {"n": ctypes.c_int64, "i": ctypes.c_void_p, "f": ctypes.c_void_p, "s": ctypes.c_float}
_DTYPES = {"i": torch.int64, "f": torch.float32}


@functools.cache
def library() -> ctypes.CDLL:
    """The compiled functions.

    Raises:
        NotBuilt: where they cannot be compiled.
    """
    found = built(Path(__file__).with_name("rows.c"))
    for name, kinds in _ARGUMENTS.items():
        getattr(found, name).argtypes = [*(_TYPES[kind] for kind in kinds), ctypes.c_int]
    return found


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
    """The k largest numbers of each row and their columns, ascending; of equal numbers any.

    Raises:
        InputError: unless 0 < k <= width.
    """
    n_rows, width = matrix.shape
    k = operator.index(k)
    if not 0 < k <= width:
        raise InputError(f"`k` must be in [1, {width}], the width of the rows, got k={k}.")
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
    bias1, bias2 = (1 - float(beta) ** steps for beta in betas)
    # All in double precision until here: 1 - 0.999 in float32 is off by 1e-5.
    rates = [rate for beta in map(float, betas) for rate in (beta, 1 - beta)]
    scales = (lr / bias1, bias2**-0.5, *rates, float(eps))
    _call("adam_rows", *weights.shape, weights, gradient, first, second, *scales)
    torch.autograd.graph.increment_version(weights)


def _call(name: str, *arguments: int | float | Tensor) -> int:
    # Names keep what is contiguous alive until the function returns.
    given = [a.contiguous() if isinstance(a, Tensor) else a for a in arguments]
    sent = [_sent(kind, argument) for kind, argument in zip(_ARGUMENTS[name], given, strict=True)]
    with record_function(f"sae::{name}"):  # for profiles
        return getattr(library(), name)(*sent, torch.get_num_threads())


def _sent(kind: str, argument: int | float | Tensor) -> int | float:
    if not isinstance(argument, Tensor):
        return argument
    if argument.dtype != _DTYPES[kind]:
        raise TypeError(f"a kernel takes {_DTYPES[kind]} there, got {argument.dtype}.")
    return argument.data_ptr()


def _check(failed: int, n: int) -> None:
    if failed:
        raise InputError(
            f"`indices` must be in [0, {n:,}), and some are not: is this another dictionary's code?"
        )
