"""What the pursuits share: (rows, k) slots that become a sparse code, stopping rules, bounded memory."""

from __future__ import annotations

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor
from torch.nn import functional as F

from sae.errors import InputError
from sae.ops.sparse import SparseLatents

# Numbers of one (rows, n_latents) tensor worked on at a time: small enough for a processor's cache, and on an
# accelerator large enough to fill it.
_ON_CPU, _ON_ACCELERATOR = 2**20, 2**27
_FEWEST_ROWS = 128
# Most atoms whose Gram matrix is made: 1 GiB in float32.
_GRAM_ATOMS = 16_384


def check_k(k: int, n_latents: int) -> None:
    """Raises InputError unless 1 <= k <= n_latents."""
    if not 1 <= k <= n_latents:
        raise InputError(f"`k` must be in [1, n_latents={n_latents}], got k={k}; lower k or raise n_latents.")


def from_slots(values: Float[Tensor, "rows k"], indices: Int[Tensor, "rows k"]) -> SparseLatents:
    """CSR of k values a row and their latents; slots that hold zero are left out."""
    kept = values != 0
    return SparseLatents(values[kept], indices[kept], F.pad(kept.sum(1).cumsum(0), (1, 0)))


def mixed(
    slots: Int[Tensor, "rows k"], matrix: Float[Tensor, "n width"], weights: Float[Tensor, "rows k"]
) -> Float[Tensor, "rows width"]:
    """Of each row, the sum of the matrix's rows that its slots name, times their weights."""
    return F.embedding_bag(slots, matrix, per_sample_weights=weights, mode="sum")


def rows_at_once(n_latents: int, device: torch.device) -> int:
    """How many rows to pursue together, so that memory does not grow with the rows of a call."""
    return max(_FEWEST_ROWS, (_ON_CPU if device.type == "cpu" else _ON_ACCELERATOR) // n_latents)


def working_copy(tensor: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows d_model"]:
    """The tensor in float64 if it is that, else in float32: half precision cannot hold a residual."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def gram_if_it_pays(
    atoms: Float[Tensor, "n_latents d_model"], rows: int, rounds: int
) -> Float[Tensor, "n_latents n_latents"] | None:
    """Atoms @ atomsᵀ, or None where it is too large or costs more than it saves.

    The Gram matrix costs n_latents / rows products of the rows with the atoms, and saves nearly one such
    product in every round after the first.
    """
    return atoms @ atoms.T if gram_pays(len(atoms), rows, rounds) else None


def gram_pays(n_latents: int, rows: int, rounds: int) -> bool:
    """Whether it is small enough, and costs less than it saves."""
    return n_latents <= min(_GRAM_ATOMS, rows * (rounds - 1))


def energy_to_leave(
    energy: Float64[Tensor, " rows"], residual_threshold: float | Float[Tensor, " rows"]
) -> Float64[Tensor, " rows"]:
    """The |residual|² at which each row stops, given |x|² and the share of |x| that may be left.

    Raises:
        InputError: if a share is negative.
    """
    share = torch.as_tensor(residual_threshold, dtype=torch.float64, device=energy.device)
    if (share < 0).any() or share.isnan().any():
        raise InputError(
            f"`residual_threshold` must be at least 0, got {float(share.min()):g}; it is a share of |x|."
        )
    return energy * share.square()
