"""Sparse codes in CSR form, and the products of an autoencoder whose gradients are as sparse as the code."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

with warnings.catch_warnings():
    # torch says once per process that CSR is in beta: let it say so here, unheard. The products used
    # below are tested against dense ones.
    warnings.simplefilter("ignore")
    torch.eye(1).to_sparse_csr()


class SparseLatents(NamedTuple):
    """The latents of a batch of rows, row after row (CSR)."""

    values: Float[Tensor, " active"]
    """Latents of row 0, then of row 1, and so on."""
    indices: Int[Tensor, " active"]
    """Which latent each value belongs to; no latent twice in a row."""
    row_offsets: Int[Tensor, " rows_and_end"]
    """Row r owns the entries `row_offsets[r]` to `row_offsets[r + 1]`."""

    @property
    def n_rows(self) -> int:
        """Number of rows coded."""
        return len(self.row_offsets) - 1

    @property
    def rows(self) -> Int[Tensor, " active"]:
        """The row that each entry belongs to."""
        lengths = self.row_offsets.diff()
        return torch.arange(self.n_rows, device=lengths.device).repeat_interleave(
            lengths, output_size=len(self.indices)
        )

    def without_zeros(self) -> SparseLatents:
        """The same code without entries whose value is zero (a latent fires where it is not)."""
        kept = self.values != 0
        ends = torch.cat([kept.new_zeros(1, dtype=torch.int64), kept.cumsum(0)])[self.row_offsets]
        return SparseLatents(self.values[kept], self.indices[kept], ends)

    def spread(self, present: Bool[Tensor, " all_rows"]) -> SparseLatents:
        """The same code among rows that were not coded: row i becomes the i-th one where `present`."""
        lengths = self.row_offsets.new_zeros(len(present))
        lengths[present] = self.row_offsets.diff()
        return self._replace(row_offsets=F.pad(lengths.cumsum(0), (1, 0)))

    def with_values_of(self, matrix: Float[Tensor, "rows n_latents"]) -> SparseLatents:
        """The same entries with the values that a matrix has there."""
        return self._replace(values=matrix[self.rows, self.indices])

    def to_dense(self, n_latents: int) -> Float[Tensor, "rows n_latents"]:
        """The code as a matrix."""
        dense = self.values.new_zeros(self.n_rows, n_latents)
        return dense.index_put((self.rows, self.indices), self.values)


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
    """Gives the selected pre-activations x · W_enc[i] + b_enc[i] their gradients to W_enc and b_enc.

    The values in `code` come from the dense product that the selection needed anyway, so nothing is
    computed again; the gradients are sums over the selected entries only. x gets no gradient.
    """
    values = _SelectedPreActs.apply(code.values, W_enc, b_enc, x, code)
    return code._replace(values=values)


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
        ctx.save_for_backward(x, code.indices, code.row_offsets)
        ctx.n_latents = len(W_enc)
        return values.to(W_enc.dtype, copy=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, indices, row_offsets = ctx.saved_tensors
        transposed = _transposed(SparseLatents(grad, indices, row_offsets), ctx.n_latents)
        ones = grad.new_ones(len(x), 1)
        return None, transposed @ x.to(grad.dtype), (transposed @ ones).squeeze(1), None, None


class _Decode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, W_dec: Tensor, code: SparseLatents) -> Tensor:
        ctx.save_for_backward(values, W_dec, code.indices, code.row_offsets)
        return F.embedding_bag(
            code.indices, W_dec, code.row_offsets[:-1], mode="sum", per_sample_weights=values
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        values, W_dec, indices, row_offsets = ctx.saved_tensors
        code = SparseLatents(values, indices, row_offsets)
        grad = grad.contiguous()
        grad_values = _at_entries(grad, W_dec, code) if ctx.needs_input_grad[0] else None
        grad_W_dec = _transposed(code, len(W_dec)) @ grad if ctx.needs_input_grad[1] else None
        return grad_values, grad_W_dec, None


def _at_entries(grad: Tensor, W_dec: Tensor, code: SparseLatents) -> Tensor:
    """(grad @ W_dec.T) at the code's entries only, (active,)."""
    zeros = torch.zeros_like(code.values)
    pattern = _csr(code.row_offsets, code.indices, zeros, (len(grad), len(W_dec)))
    return torch.sparse.sampled_addmm(pattern, grad, W_dec.T).values()


def _transposed(code: SparseLatents, n_latents: int) -> Tensor:
    """The code as an (n_latents, rows) CSR matrix: entries sorted by latent, rows ascending in each."""
    by_latent = code.indices.argsort(stable=True)
    # Not bincount: on a GPU that waits for the device to learn its own length.
    counts = code.indices.new_zeros(n_latents).scatter_add_(0, code.indices, torch.ones_like(code.indices))
    ends = F.pad(counts.cumsum(0), (1, 0))
    return _csr(ends, code.rows[by_latent], code.values[by_latent], (n_latents, code.n_rows))


def _csr(row_offsets: Tensor, columns: Tensor, values: Tensor, size: tuple[int, int]) -> Tensor:
    # Checking the invariants would cost as much as the product; they hold by construction.
    return torch.sparse_csr_tensor(row_offsets, columns, values, size, check_invariants=False)
