"""The encoder's product, some rows at a time: no matrix of all rows and latents is ever held."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

# Pre-activations held at once. On a CPU a product of fewer rows costs more, since the weights are laid out
# anew for each; on an accelerator the matrix of one batch is held whole unless it is a large one.
_ON_CPU, _ON_ACCELERATOR = 2**22, 2**29
_FEWEST_ROWS = 256


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
    held = v.new_empty(min(at_once, len(v)), len(W_enc))
    for first in range(0, max(1, len(v)), at_once):
        rows = v[first : first + at_once]
        yield Block(first, torch.addmm(b_enc, rows, W_enc.T, out=held[: len(rows)]))


def rows_at_once(n_latents: int, device: torch.device) -> int:
    """How many rows a block has."""
    return max(_FEWEST_ROWS, (_ON_CPU if device.type == "cpu" else _ON_ACCELERATOR) // n_latents)


def _dtype(v: Tensor) -> torch.dtype:
    # Autocast leaves products into given memory alone.
    kind = v.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else v.dtype
