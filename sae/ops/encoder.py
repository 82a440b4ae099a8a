"""The encoder's product, some rows at a time: no matrix of all rows and latents is ever held."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

# Pre-activations held at once. On a CPU a product of fewer rows costs more, since the weights are laid out
# anew for each; on an accelerator the matrix of one batch is held whole unless it is a large one.
_ON_CPU, _ON_ACCELERATOR = 2**22, 2**29
_FEWEST_ROWS = 256


Product = Callable[[Tensor], Tensor]


class Block(NamedTuple):
    """Pre-activations of some rows; the next block takes their place in memory."""

    first: int
    """Which row of the batch is the block's first."""
    pre_acts: Float[Tensor, "some n_latents"]


@torch.no_grad()
def pre_act_blocks(
    v: Float[Tensor, "rows d_model"],
    W_enc: Float[Tensor, "n_latents d_model"],
    b_enc: Float[Tensor, " n_latents"],
) -> Iterator[Block]:
    """v @ W_enc.T + b_enc, block after block, in the dtype that autocast asks for; without gradients.

    There is a block even if there are no rows.
    """
    v, W_enc, b_enc = (tensor.detach().to(_dtype(v)) for tensor in (v, W_enc, b_enc))
    at_once = rows_at_once(len(W_enc), v.device)
    product = _one_dnn(W_enc, b_enc, at_once) if _has_one_dnn(v) else _in_place(v, W_enc, b_enc, at_once)
    for first in range(0, max(1, len(v)), at_once):
        yield Block(first, product(v[first : first + at_once]))


def _in_place(v: Tensor, W_enc: Tensor, b_enc: Tensor, at_once: int) -> Product:
    held = v.new_empty(min(at_once, len(v)), len(W_enc))
    return lambda rows: torch.addmm(b_enc, rows, W_enc.T, out=held[: len(rows)])


def _one_dnn(W_enc: Tensor, b_enc: Tensor, at_once: int) -> Product:
    """By oneDNN, with the weights laid out once for all blocks, and the bias added on the way."""
    packed = torch.ops.mkldnn._reorder_linear_weight(W_enc.contiguous(), at_once)
    return lambda rows: torch.ops.mkldnn._linear_pointwise(rows, packed, b_enc, "none", [], "")


def _has_one_dnn(v: Tensor) -> bool:
    if v.device.type != "cpu" or v.dtype != torch.float32 or len(v) == 0:
        return False
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")


def rows_at_once(n_latents: int, device: torch.device) -> int:
    """How many rows a block has."""
    return max(_FEWEST_ROWS, (_ON_CPU if device.type == "cpu" else _ON_ACCELERATOR) // n_latents)


def _dtype(v: Tensor) -> torch.dtype:
    # Autocast leaves products into given memory alone.
    kind = v.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else v.dtype
