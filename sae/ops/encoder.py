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


class PreActs:
    """v @ W_enc.T + b_enc, block after block, in the dtype that autocast asks for; without gradients.

    It can be gone through more than once. There is a block even if there are no rows.
    """

    def __init__(
        self,
        v: Float[Tensor, "rows d_model"],
        W_enc: Float[Tensor, "n_latents d_model"],
        b_enc: Float[Tensor, " n_latents"],
        at_once: int | None = None,
    ) -> None:
        """Takes what is to be multiplied.

        Args:
            v: what the encoder sees.
            W_enc: a row for each latent.
            b_enc: a number for each.
            at_once: rows of a block; None = as many as suit the device.
        """
        dtype = _dtype(v)
        self._v, self._W_enc, self._b_enc = (tensor.detach().to(dtype) for tensor in (v, W_enc, b_enc))
        self.n_rows, self.n_latents, self.device = len(v), len(W_enc), v.device
        self._at_once = at_once or rows_at_once(self.n_latents, self.device)

    def __iter__(self) -> Iterator[Block]:
        # What is multiplied here needs no gradients; torch's decorator would hold a block until the next is
        # there.
        make = _one_dnn if _has_one_dnn(self._v) else _in_place
        product = make(self._v, self._W_enc, self._b_enc, self._at_once)
        for first in range(0, max(1, self.n_rows), self._at_once):
            yield Block(first, product(self._v[first : first + self._at_once]))


def _in_place(v: Tensor, W_enc: Tensor, b_enc: Tensor, at_once: int) -> Product:
    held = v.new_empty(min(at_once, len(v)), len(W_enc))
    return lambda rows: torch.addmm(b_enc, rows, W_enc.T, out=held[: len(rows)])


def _one_dnn(v: Tensor, W_enc: Tensor, b_enc: Tensor, at_once: int) -> Product:
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
