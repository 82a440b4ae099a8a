"""Rows of a world, drawn as training asks for them, on the device that trains."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import lightning
import torch
from torch import Tensor

from sae.activations.cache import RowBatch
from sae.activations.ranks import ALONE, Ranks
from sae.activations.synthetic.config import WorldConfig, preset
from sae.activations.synthetic.world import MOMENTS_STREAM, World
from sae.errors import InputError
from sae.ops.moments import Moments

_FIRST_TRAIN_STREAM = 2  # 0 is held-out rows, 1 is for moments


class WorldStream(lightning.LightningDataModule):
    """Fresh rows of a world for every step, without a cache; no row is seen twice.

    Rank r of R draws its own stretch of each batch, the same rows as one process alone would have there.
    The order of rows depends on the run's seed; held-out rows are the same for all runs.
    """

    def __init__(
        self, world: str | WorldConfig | World = "small", batch_size: int = 2048, held_out_rows: int = 20_000
    ) -> None:
        """Describes the data; nothing is drawn yet.

        Args:
            world: name of a preset, a configuration, or a world.
            batch_size: rows per training step, over all ranks.
            held_out_rows: rows to validate and test on: the first ones of the world's stream 0.

        Raises:
            InputError: for an unknown or impossible world, or numbers below 1.
        """
        super().__init__()
        for name, value in (("batch_size", batch_size), ("held_out_rows", held_out_rows)):
            if value < 1:
                raise InputError(f"`{name}` must be at least 1, got {name}={value}.")
        if not isinstance(world, World):
            world = World(preset(world) if isinstance(world, str) else world)
        self.world, self.batch_size, self.held_out_rows = world, batch_size, held_out_rows
        self._loader: WorldLoader | None = None
        self._moments: Moments | None = None
        self._position: dict[str, Any] = {}

    @property
    def d_model(self) -> int:
        """Width of the rows."""
        return self.world.config.d_model

    @property
    def moments(self) -> Moments:
        """Mean and second moments, estimated once from rows that neither training nor validation sees."""
        if self._moments is None:
            self._moments = self.world.moments()
        return self._moments

    def first_rows(self, n: int) -> Tensor:
        """Rows of the stream that the moments are of."""
        return self.world.rows(0, n, stream=MOMENTS_STREAM).x

    def train_dataloader(self) -> WorldLoader:
        """Batches without end, resumable."""
        trainer = self.trainer
        device = trainer.strategy.root_device if trainer else torch.device("cpu")
        self._loader = WorldLoader(self.world, self.batch_size, torch.initial_seed(), self._ranks, device)
        if self._position:
            self._loader.go_to(self._position)
            self._position = {}
        return self._loader

    def val_dataloader(self) -> HeldOutRows:
        """The held-out rows in order; ranks share every batch."""
        device = self.trainer.strategy.root_device if self.trainer else torch.device("cpu")
        return HeldOutRows(self.world, self.batch_size, self.held_out_rows, self._ranks, device)

    def test_dataloader(self) -> HeldOutRows:
        """The same rows as in validation."""
        return self.val_dataloader()

    @property
    def waited_s(self) -> float:
        """Seconds that training has waited for batches in this process; on a GPU for their launch."""
        return self._loader.waited_s if self._loader else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Where training stands: after the batches finished, not those fetched."""
        if self._loader is None or self.trainer is None:
            return {}
        done = self.trainer.fit_loop.epoch_loop.batch_progress.total.completed
        return {**self._loader.position(), "step": done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remembers where the next `train_dataloader` begins."""
        self._position = state_dict

    @property
    def _ranks(self) -> Ranks:
        return Ranks(self.trainer.global_rank, self.trainer.world_size) if self.trainer else ALONE


class WorldLoader:
    """Batches of a world's rows, endlessly: batch i is rows i * batch_size to (i + 1) * batch_size.

    It has no `state_dict`: Lightning would save the position of the batch fetched; the datamodule saves that
    of the batch finished.
    """

    def __init__(
        self,
        world: World,
        batch_size: int,
        seed: int,
        ranks: Ranks = ALONE,
        device: torch.device | str = "cpu",
    ) -> None:
        """Prepares the stream.

        Raises:
            InputError: if a batch cannot be shared equally.
        """
        if batch_size % ranks.world:
            raise InputError(f"`batch_size`={batch_size} must be a multiple of the {ranks.world} ranks.")
        self._world, self._batch_size, self._seed = world, batch_size, seed
        self._ranks, self._device = ranks, device
        self._step = 0
        self.waited_s = 0.0
        """Seconds spent drawing."""

    def __iter__(self) -> Iterator[RowBatch]:
        """From the present position on."""
        share = self._batch_size // self._ranks.world
        while True:
            began = time.perf_counter()
            begin = self._step * self._batch_size + self._ranks.rank * share
            rows = self._world.rows(begin, begin + share, self._device, _FIRST_TRAIN_STREAM + self._seed)
            self.waited_s += time.perf_counter() - began
            self._step += 1
            yield RowBatch(rows.x, None, None)

    def position(self) -> dict[str, Any]:
        """The position and all that it means."""
        return {"step": self._step, "seed": self._seed, **self._meaning()}

    def _meaning(self) -> dict[str, Any]:
        return {"batch_size": self._batch_size, "world": self._world.config.identity()}

    def go_to(self, state: dict[str, Any]) -> None:
        """Continues from a saved position, in the saved order.

        Raises:
            InputError: if the position was saved in another world, or means other rows here.
        """
        for name, value in self._meaning().items():
            if state.get(name, value) != value:
                raise InputError(
                    f"the position was saved with {name}={state[name]}, here it is {value}; continue with the"
                    " saved value."
                )
        self._step, self._seed = state["step"], state["seed"]


class HeldOutRows:
    """The first rows of a world's stream 0, in order; several ranks share every batch."""

    def __init__(
        self,
        world: World,
        batch_size: int,
        n_rows: int,
        ranks: Ranks = ALONE,
        device: torch.device | str = "cpu",
    ) -> None:
        self._world, self._batch_size, self._n_rows = world, batch_size, n_rows
        self._ranks, self._device = ranks, device

    def __len__(self) -> int:
        """Number of batches."""
        return -(-self._n_rows // self._batch_size)

    def __iter__(self) -> Iterator[RowBatch]:
        """The batches; every rank gets a stretch of each, of equal length but for one row."""
        rank, world = self._ranks
        for begin in range(0, self._n_rows, self._batch_size):
            size = min(self._batch_size, self._n_rows - begin)
            first, last = begin + size * rank // world, begin + size * (rank + 1) // world
            if first < last:
                yield RowBatch(self._world.rows(first, last, self._device).x, None, None)
            else:
                yield RowBatch(torch.empty(0, self._world.config.d_model, device=self._device), None, None)
