"""Entries that lie row after row, by where each row's begin."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor


def rows_of(offsets: Int[Tensor, " rows_and_end"], n_entries: int) -> Int[Tensor, " entries"]:
    """The row of each entry, where row r has those from offsets[r] to offsets[r + 1]; without a wait."""
    rows = torch.arange(len(offsets) - 1, device=offsets.device)
    return rows.repeat_interleave(offsets.diff(), output_size=n_entries)
