"""Sparse codes in CSR form, and the products of an autoencoder whose gradients are as sparse as the code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from sae.errors import InputError
from sae.ops.bags import products, sum_rows
from sae.ops.kernels import kernel
from sae.ops.offsets import rows_of


class ByLatent(NamedTuple):
    """The entries of a code in the order of their latents, rows ascending in each."""

    order: Int[Tensor, " active"]
    """The places of the entries."""
    rows: Int[Tensor, " active"]
    """The rows that these belong to."""
    offsets: Int[Tensor, " latents_and_end"]
    """Latent i owns `order[offsets[i]:offsets[i + 1]]`."""


class SparseLatents(NamedTuple):
    """The latents of a batch of rows, row after row (CSR)."""

    values: Float[Tensor, " active"]
    """Latents of row 0, then of row 1, and so on."""
    indices: Int[Tensor, " active"]
    """Which latent each value belongs to; no latent twice in a row."""
    row_offsets: Int[Tensor, " rows_and_end"]
    """Row r owns the entries `row_offsets[r]` to `row_offsets[r + 1]`."""
    by_latent: ByLatent | None = None
    """Of these indices, where somebody has sorted them already: the gradients of both weights want it."""

    def check(self, n_latents: int) -> None:
        """Raises `InputError` unless it is a code of so many latents; waits for the device."""
        if len(self.values) != len(self.indices):
            raise InputError(
                f"a code must have as many `values` as `indices`, got {len(self.values)} and"
                f" {len(self.indices)}."
            )
        if len(self.indices):
            least, most = self.indices.min().item(), self.indices.max().item()
            if least < 0 or most >= n_latents:
                raise InputError(
                    f"`indices` must be in [0, n_latents={n_latents}), got {least} to {most}: is this the"
                    " code of another dictionary?"
                )
        offsets = self.row_offsets
        if (
            not len(offsets)
            or offsets[0] != 0
            or offsets[-1] != len(self.indices)
            or (offsets.diff() < 0).any()
        ):
            raise InputError(
                f"`row_offsets` must rise from 0 to the {len(self.indices)} entries, got"
                f" {offsets[:3].tolist()} ... {offsets[-1:].tolist()}."
            )

    @property
    def n_rows(self) -> int:
        """Number of rows coded."""
        return len(self.row_offsets) - 1

    @property
    def rows(self) -> Int[Tensor, " active"]:
        """The row that each entry belongs to."""
        return rows_of(self.row_offsets, len(self.indices))

    def places(self, n_latents: int) -> Int[Tensor, " active"]:
        """Where each entry is in the matrix of all latents, row after row."""
        return self.rows * n_latents + self.indices

    def to(self, device: torch.device) -> SparseLatents:
        """The same on a device."""
        return SparseLatents(self.values.to(device), self.indices.to(device), self.row_offsets.to(device))

    def without_zeros(self) -> SparseLatents:
        """The same code without entries whose value is zero (a latent fires where it is not)."""
        kept = self.values != 0
        ends = torch.cat([kept.new_zeros(1, dtype=torch.int64), kept.cumsum(0)])[self.row_offsets]
        return SparseLatents(self.values[kept], self.indices[kept], ends)

    def spread(self, present: Bool[Tensor, " all_rows"]) -> SparseLatents:
        """The same code among rows that were not coded: row i becomes the i-th one where `present`."""
        lengths = self.row_offsets.new_zeros(len(present))
        lengths[present] = self.row_offsets.diff()
        return self._replace(row_offsets=F.pad(lengths.cumsum(0), (1, 0)), by_latent=None)

    def to_dense(self, n_latents: int) -> Float[Tensor, "rows n_latents"]:
        """The code as a matrix."""
        dense = self.values.new_zeros(self.n_rows, n_latents)
        return dense.index_put((self.rows, self.indices), self.values)


def joined(parts: Sequence[SparseLatents]) -> SparseLatents:
    """The codes of some rows, of those that follow them, and so on, as one."""
    if len(parts) == 1:
        return parts[0]
    lengths = torch.cat([part.row_offsets.diff() for part in parts])
    values, indices = (torch.cat(side) for side in zip(*((p.values, p.indices) for p in parts), strict=True))
    return SparseLatents(values, indices, F.pad(lengths.cumsum(0), (1, 0)))


def from_dense(latents: Float[Tensor, "rows n_latents"]) -> SparseLatents:
    """The non-zero entries of a matrix of latents."""
    rows, indices = latents.nonzero(as_tuple=True)
    counts = torch.bincount(rows, minlength=len(latents))
    return SparseLatents(latents[rows, indices], indices, F.pad(counts.cumsum(0), (1, 0)))


def sparse_pre_acts(
    x: Float[Tensor, "rows d_model"],
    W_enc: Float[Tensor, "n_latents d_model"],
    b_enc: Float[Tensor, " n_latents"],
    code: SparseLatents,
) -> SparseLatents:
    """Gives the selected pre-activations x · W_enc[i] + b_enc[i] their gradients to W_enc, b_enc and x.

    The values in `code` come from the dense product that the selection needed anyway, so nothing is
    computed again; the gradients are sums over the selected entries only.
    """
    code = code._replace(by_latent=sorted_by_latent(code, len(W_enc)))
    return code._replace(values=_SelectedPreActs.apply(code.values.detach(), W_enc, b_enc, x, code))


def sparse_decode(
    code: SparseLatents, W_dec: Float[Tensor, "n_latents d_model"]
) -> Float[Tensor, "rows d_model"]:
    """latents @ W_dec, by the rows of W_dec that the code names; gradients to the values and to W_dec."""
    return _Decode.apply(code.values.to(W_dec.dtype), W_dec, code)


class _SelectedPreActs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, values: Tensor, W_enc: Tensor, b_enc: Tensor, x: Tensor, code: SparseLatents
    ) -> Tensor:
        ctx.save_for_backward(x, W_enc)
        ctx.code = code._replace(values=values.new_empty(0))  # those are the gradients, in the backward pass
        return values.to(W_enc.dtype, copy=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, W_enc = ctx.saved_tensors
        code = ctx.code._replace(values=grad)
        of_W_enc = of_b_enc = of_x = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            order, rows, offsets = _by_latent(code, len(W_enc))
            ordered = grad.index_select(0, order)
            of_W_enc = sum_rows(ordered, rows, offsets, x.to(grad.dtype))
            of_b_enc = sum_rows(ordered, torch.zeros_like(rows), offsets, grad.new_ones(1, 1)).squeeze(1)
        if ctx.needs_input_grad[3]:
            of_x = sum_rows(grad, code.indices, code.row_offsets, W_enc).to(x.dtype)
        return None, of_W_enc, of_b_enc, of_x, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, code: SparseLatents) -> Tensor:
        ctx.save_for_backward(values, W_dec)
        ctx.code = code._replace(values=values.detach())
        return sum_rows(values, code.indices, code.row_offsets, W_dec)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, W_dec = ctx.saved_tensors
        code = ctx.code._replace(values=values)
        grad = grad.contiguous()
        grad_values = grad_W_dec = None
        if ctx.needs_input_grad[0]:
            grad_values = products(grad, code.indices, code.row_offsets, W_dec)
        if ctx.needs_input_grad[1]:
            order, rows, offsets = _by_latent(code, len(W_dec))
            grad_W_dec = sum_rows(values.index_select(0, order), rows, offsets, grad)
        return grad_values, grad_W_dec, None


def _by_latent(code: SparseLatents, n_latents: int) -> ByLatent:
    return sorted_by_latent(code, n_latents) if code.by_latent is None else code.by_latent


def sorted_by_latent(code: SparseLatents, n_latents: int) -> ByLatent:
    """The order of a code's entries by latent; stable, so the gradients' sums have one order."""
    indices = code.indices
    if (served := kernel("by_latent", code.values)) is not None:
        return ByLatent(*served(indices, code.row_offsets, n_latents))
    # Not bincount: on a GPU that waits for the device to learn its own length.
    counts = indices.new_zeros(n_latents).scatter_add_(0, indices, torch.ones_like(indices))
    order = indices.to(torch.int32).argsort(stable=True)
    return ByLatent(order, code.rows[order], F.pad(counts.cumsum(0), (1, 0)))
