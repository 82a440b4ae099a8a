"""The k largest of every row, faster on a CPU than by `topk`."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.ops.kernels import kernel

GROUP = 16
"""Numbers of which the largest stands for all in the first round."""
_SORTED = (torch.float32, torch.float64)
"""What numpy sorts with vector instructions."""


class Largest(NamedTuple):
    """Of each row, in any order."""

    values: Float[Tensor, "rows k"]
    columns: Int[Tensor, "rows k"]


def largest(matrix: Float[Tensor, "rows width"], k: int) -> Largest:
    """The k largest numbers of each row and their columns; of equal numbers any. NaN is above all."""
    if k > 0 and (served := kernel("largest", matrix)) is not None:
        return Largest(*served(matrix, k))
    if matrix.device.type != "cpu":
        return Largest(*matrix.topk(k, dim=1, sorted=False))
    columns = _in_rounds(matrix, k)
    return Largest(matrix.gather(1, columns), columns)


def _in_rounds(matrix: Tensor, k: int) -> Tensor:
    """The columns of the k largest.

    Each of them is in one of the k groups whose own largest are the largest. A group has every so-many-th
    column, so that all groups' largest are found at the speed of memory, and few are left to choose among.
    """
    width = matrix.shape[1]
    if width < 2 * GROUP * k:
        return _among_few(matrix, k)
    n_groups = width // GROUP
    grouped = matrix[:, : GROUP * n_groups].unflatten(1, (GROUP, n_groups))
    groups = _in_rounds(grouped.amax(1), k)
    candidates = grouped.gather(2, groups[:, None].expand(-1, GROUP, -1)).flatten(1)
    ungrouped = width - GROUP * n_groups
    if ungrouped:
        candidates = torch.cat([candidates, matrix[:, -ungrouped:]], dim=1)
    places = _among_few(candidates, k)
    columns = places // k * n_groups + groups.gather(1, places % k)
    if ungrouped:
        columns = torch.where(places < GROUP * k, columns, places - candidates.shape[1] + width)
    return columns


def _among_few(matrix: Tensor, k: int) -> Tensor:
    """The same by sorting: numpy sorts short rows many times faster than torch chooses from them."""
    n_rows, width = matrix.shape
    if matrix.dtype in _SORTED and 0 < k < width:
        level = np.sort(matrix.numpy(), axis=1)[:, -k, None]
        places = (matrix >= torch.from_numpy(level)).flatten().nonzero().squeeze(1)
        if len(places) == n_rows * k:  # no equal numbers at the level, nothing that is not a number
            return places.view(n_rows, k) % max(1, width)
    return matrix.topk(k, dim=1, sorted=False).indices
