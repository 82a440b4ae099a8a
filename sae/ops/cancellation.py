"""How much of a sparse code cancels itself: parts that take away what other parts put in."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sae.errors import InputError
from sae.ops.group import ALONE, Group
from sae.ops.sparse import SparseLatents, sparse_decode

# Rows decoded at a time: bounds memory for any number of rows in a code.
_CHUNK = 4096


class Cancellation:
    """1 - Σ |x_hat - mean|₁ / Σ |value| |direction|₁, over rows and over their entries.

    What the parts of a code put into each coordinate, and how much of it another part takes out again:
    0 where parts only add up, towards 1 where nearly all of it cancels. In the 1-norm nothing but opposite
    signs on one coordinate makes a difference: parts on different coordinates do not cancel, whatever their
    angle.
    """

    def __init__(self) -> None:
        self._rows = 0
        self._left = 0.0
        self._put_in = 0.0

    @torch.no_grad()
    def add(self, code: SparseLatents, directions: Float[Tensor, "n_latents d_model"]) -> None:
        """Takes the codes of some rows.

        Raises:
            InputError: if the code names a direction that is not there.
        """
        code.check(len(directions))
        sizes = directions.abs()
        for first in range(0, code.n_rows, _CHUNK):
            offsets = code.row_offsets[first : first + _CHUNK + 1]
            begin, end = int(offsets[0]), int(offsets[-1])
            values = code.values[begin:end].to(directions.dtype)
            part = SparseLatents(values, code.indices[begin:end], offsets - begin)
            # The same sums on both sides, so that parts which only add up give exactly 0.
            left = sparse_decode(part, directions).abs()
            put_in = sparse_decode(part._replace(values=values.abs()), sizes)
            self._left += left.sum(dtype=torch.float64).item()
            self._put_in += put_in.sum(dtype=torch.float64).item()
        self._rows += code.n_rows

    def merge(self, group: Group = ALONE) -> None:
        """Adds the rows of all ranks."""
        sums = torch.tensor([self._rows, self._left, self._put_in], dtype=torch.float64)
        group.sum_(sums)
        rows, self._left, self._put_in = sums.tolist()
        self._rows = int(rows)

    def compute(self) -> float:
        """The share that cancels, over all rows added; 0 where all their codes are empty.

        Raises:
            InputError: before the first row.
        """
        if self._rows == 0:
            raise InputError("`Cancellation` needs at least one row, got none; call add first.")
        return 1 - self._left / self._put_in if self._put_in > 0 else 0.0


def cancellation(code: SparseLatents, directions: Float[Tensor, "n_latents d_model"]) -> float:
    """The share of a code that cancels itself: `Cancellation` of these rows alone."""
    measured = Cancellation()
    measured.add(code, directions)
    return measured.compute()
