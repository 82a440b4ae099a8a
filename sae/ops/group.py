"""Ranks that compute something together: sums, shares and agreement."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


class Group:
    """This process among those that compute together; alone unless `of_training` finds others.

    What is shared is dealt by row, what is summed ends equal on all ranks. Alone, nothing is copied.
    """

    def __init__(self, rank: int = 0, world: int = 1, device: torch.device | None = None) -> None:
        self.rank, self.world = rank, world
        self._device = device

    @classmethod
    def of_training(cls, device: torch.device) -> Group:
        """The ranks that torch.distributed knows of; `device` is where collectives move their data."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size(), device)

    def share(self, rows: Tensor) -> Tensor:
        """This rank's part of the rows: the parts are stretches, of equal length but for one row."""
        return rows if self.world == 1 else rows.tensor_split(self.world)[self.rank]

    def sum_(self, *tensors: Tensor) -> None:
        """Replaces each tensor by its sum over the ranks."""
        if self.world > 1:
            for tensor in tensors:
                moved = tensor.to(self._device)
                dist.all_reduce(moved)
                tensor.copy_(moved)

    def max_(self, tensor: Tensor) -> None:
        """Replaces the tensor by its largest over the ranks, number by number."""
        if self.world > 1:
            moved = tensor.to(self._device)
            dist.all_reduce(moved, dist.ReduceOp.MAX)
            tensor.copy_(moved)

    def of_first_(self, *tensors: Tensor) -> None:
        """Replaces each tensor by the first rank's."""
        if self.world > 1:
            for tensor in tensors:
                moved = tensor.to(self._device)
                dist.broadcast(moved, src=0)
                tensor.copy_(moved)

    def gather(self, rows: Tensor) -> Tensor:
        """The rows of all ranks, in the order of ranks; their numbers may differ."""
        if self.world == 1:
            return rows
        counts = torch.zeros(self.world, dtype=torch.int64)
        counts[self.rank] = len(rows)
        self.sum_(counts)
        longest = int(counts.max())
        padded = rows.new_zeros(longest, *rows.shape[1:])
        padded[: len(rows)] = rows
        padded = padded.to(self._device)
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        dist.all_gather(parts, padded)
        return torch.cat([part[:n] for part, n in zip(parts, counts.tolist(), strict=True)]).to(rows.device)

    def gather_equal(self, values: Tensor) -> Tensor:
        """The values of all ranks, (ranks, ...): of equal shape everywhere, so nobody is asked how many."""
        if self.world == 1:
            return values[None]
        moved = values.contiguous().to(self._device)
        parts = [torch.empty_like(moved) for _ in range(self.world)]
        dist.all_gather(parts, moved)
        return torch.stack(parts).to(values.device)

    def any(self, here: bool) -> bool:
        """Whether it holds on any rank."""
        count = torch.tensor(float(here))
        self.sum_(count)
        return bool(count > 0)

    def objects(self, value: object) -> list[object]:
        """Everybody's value, in the order of ranks; small, picklable, of ranks that trust each other."""
        if self.world == 1:
            return [value]
        values: list[object] = [None] * self.world
        dist.all_gather_object(values, value)
        return values


ALONE = Group()
