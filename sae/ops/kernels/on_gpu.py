"""Sums of weighted rows and products with rows, as Triton kernels: for a GPU, or Triton's interpreter.

Deterministic: every number is summed by one program in one order, nothing is added atomically. Sums are in
float32, whatever the dtypes. A program takes several entries at once, so that it waits for several rows of
memory at the same time; no tensor has a row for every entry.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from sae.ops.offsets import rows_of

PIECE = 256
"""Most entries that one program adds up: of a longer bag the further pieces are summed by other programs."""
_ENTRIES = 16
_WIDEST = 256


def sum_rows(
    weights: Float[Tensor, " entries"],
    indices: Int[Tensor, " entries"],
    offsets: Int[Tensor, " bags_and_end"],
    matrix: Float[Tensor, "rows width"],
) -> Float[Tensor, "bags width"]:
    """Of each bag the sum of weights[e] * matrix[indices[e]], e from offsets[bag] to offsets[bag + 1].

    A bag that is longer than `PIECE` entries, such as a latent that fires nearly always, is summed in pieces
    side by side, and these in a second pass. How many there are is bounded without asking the device.
    """
    begins, ends = offsets[:-1], offsets[1:]
    out = matrix.new_empty(len(begins), matrix.shape[1])
    _launch_sums(out, begins, ends.minimum(begins + PIECE), weights, indices, matrix, add=False)
    most = len(indices) // PIECE
    if most > 0:
        further = ((ends - begins - 1).clamp_min(0) // PIECE).cumsum(
            0
        )  # pieces but the first, of all bags so far
        piece = torch.arange(most, device=offsets.device)
        bag = torch.searchsorted(further, piece, right=True).clamp_max(len(begins) - 1)
        before = F.pad(further, (1, 0))
        begin = begins[bag] + PIECE * (1 + piece - before[bag])
        # Slots beyond the last piece find no bag: their begin is not before their end.
        end = torch.where(piece < further[-1], ends[bag].minimum(begin + PIECE), begin)
        sums = torch.empty(most, matrix.shape[1], dtype=torch.float32, device=matrix.device)
        _launch_sums(sums, begin, end, weights, indices, matrix, add=False)
        _launch_sums(out, before[:-1], before[1:], None, None, sums, add=True)
    return out


def products(
    left: Float[Tensor, "n_rows width"],
    indices: Int[Tensor, " entries"],
    offsets: Int[Tensor, " rows_and_end"],
    right: Float[Tensor, "n_right width"],
) -> Float[Tensor, " entries"]:
    """For each entry of a row left[row] . right[indices[e]]."""
    rows = rows_of(offsets, len(indices))
    out = torch.empty(len(rows), dtype=left.dtype, device=left.device)
    width = left.shape[1]
    if len(rows) > 0:
        block = min(_WIDEST, triton.next_power_of_2(width))
        constants: dict[str, Any] = {"BLOCK": block, "ENTRIES": _ENTRIES}
        grid = (triton.cdiv(len(rows), _ENTRIES),)
        _products[grid](out, rows, indices, left, right, len(rows), width, **constants)
    return out


def _launch_sums(
    out: Tensor,
    begins: Tensor,
    ends: Tensor,
    weights: Tensor | None,
    indices: Tensor | None,
    matrix: Tensor,
    add: bool,
) -> None:
    bags, width = out.shape
    if bags == 0:
        return
    block = min(_WIDEST, triton.next_power_of_2(width))
    given = [out, begins.contiguous(), ends.contiguous(), weights, indices, matrix, width]
    constants: dict[str, Any] = {
        "BLOCK": block,
        "ENTRIES": _ENTRIES,
        "WEIGHTED": weights is not None,
        "ADD": add,
    }
    _sum_rows[(bags, triton.cdiv(width, block))](*given, **constants)


@triton.jit
def _sum_rows(
    out, begins, ends, weights, indices, matrix, width,
    BLOCK: tl.constexpr, ENTRIES: tl.constexpr, WEIGHTED: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    bag = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    begin, end = tl.load(begins + bag), tl.load(ends + bag)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(begin, end, ENTRIES):
        entries = first + tl.arange(0, ENTRIES)
        there = entries < end
        rows = entries.to(tl.int64)
        if WEIGHTED:
            rows = tl.load(indices + entries, mask=there, other=0).to(tl.int64)
        places = matrix + rows[:, None] * width + columns[None, :]
        found = tl.load(places, mask=there[:, None] & inside[None, :], other=0.0).to(tl.float32)
        if WEIGHTED:
            found *= tl.load(weights + entries, mask=there, other=0.0).to(tl.float32)[:, None]
        total += tl.sum(found, 0)
    place = out + bag * width + columns
    if ADD:
        if end > begin:
            total += tl.load(place, mask=inside, other=0.0).to(tl.float32)
            tl.store(place, total.to(out.dtype.element_ty), mask=inside)
    else:
        tl.store(place, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _products(
    out, rows, indices, left, right, n_entries, width, BLOCK: tl.constexpr, ENTRIES: tl.constexpr
):  # fmt: skip
    entries = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    there = entries < n_entries
    row = tl.load(rows + entries, mask=there, other=0).to(tl.int64)
    other = tl.load(indices + entries, mask=there, other=0).to(tl.int64)
    total = tl.zeros((ENTRIES, BLOCK), tl.float32)
    for first in range(0, width, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = there[:, None] & (columns < width)[None, :]
        a = tl.load(left + row[:, None] * width + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        b = tl.load(right + other[:, None] * width + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        total += a * b
    tl.store(out + entries, tl.sum(total, 1).to(out.dtype.element_ty), mask=there)
