"""Ranks that train together must mean the same thing."""

from __future__ import annotations

from typing import Any

import lightning
import torch

from sae.activations import ActivationDataModule
from sae.errors import InputError
from sae.ops.group import Group


class Agreement(lightning.Callback):
    """Compares configuration, cache and checkpoint of all ranks before any of them trains.

    They differ where a node sees another file system, or was started by another command; training on would
    hang, or end in nonsense.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        """Describes this rank: `config` is its whole configuration, as plain values."""
        self._config = config
        self.also: dict[str, str] = {}
        """What else must be equal, by a name for the message."""

    def setup(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, stage: str) -> None:
        """Raises `InputError` on every rank, naming the keys that differ."""
        if stage != "fit":
            return
        data: ActivationDataModule = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        mine = dict(flatten(self._config)) | self.also
        mine["the cache's contents"] = data.cache.manifest.get("fingerprint")
        mine["the seed"] = torch.initial_seed()  # `seed_everything: true` draws one on every rank
        group = Group.of_training(trainer.strategy.root_device)
        first, *others = group.objects(mine)
        for rank, other in enumerate(others, start=1):
            if other != first:
                error = InputError(_difference(first, other, rank))
                error.on_all_ranks = True
                raise error


def flatten(values: Any, name: str = "") -> list[tuple[str, Any]]:
    """(dotted name, value) of every leaf of nested dictionaries."""
    if not isinstance(values, dict):
        return [(name, values)]
    return [
        found for key, value in values.items() for found in flatten(value, f"{name}.{key}" if name else key)
    ]


def _difference(first: Any, other: Any, rank: int) -> str:
    names = [name for name in first if first[name] != other.get(name)] or sorted({*other} - {*first})
    shown = "; ".join(f"{n}: {first.get(n)!r} on rank 0, {other.get(n)!r} on rank {rank}" for n in names[:5])
    return (
        f"ranks disagree about what they train: {shown}. Start all with the same command, on folders that all"
        " nodes see."
    )
