"""The LightningDataModule: finds or makes the cache, and feeds its rows; needs no language model to read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning
import torch

from sae.activations.cache import ActivationCache, RowBatch, read_manifest
from sae.activations.harvest import harvest
from sae.activations.sampler import RowSampler
from sae.activations.source import Source
from sae.errors import InputError
from sae.ops.moments import Moments


class ActivationDataModule(lightning.LightningDataModule):
    """Rows of one hookpoint of an activation cache."""

    def __init__(
        self,
        cache: str | None = None,
        source: Source | None = None,
        hookpoint: str | None = None,
        batch_size: int = 2048,
    ) -> None:
        """Describes the data; nothing is read yet.

        Args:
            cache: folder of the cache; null = caches/<name made from the source>.
            source: what to harvest where the cache is missing; null = the cache must exist.
            hookpoint: which one to train on; null = the cache's only one.
            batch_size: rows (tokens) per training step, over all ranks.
        """
        super().__init__()
        if source is not None:
            source.check()
        self.source = source
        self.folder = cache_folder(cache, source)
        self.batch_size = batch_size
        self.hookpoint = hookpoint or ""
        self._moments: Moments | None = None

    def prepare_data(self) -> None:
        """Harvests the cache where it is missing or unfinished (one process per node does this)."""
        open_or_harvest(self.folder, self.source)

    def setup(self, stage: str | None = None) -> None:
        """Opens the cache and settles the hookpoint."""
        self.cache = ActivationCache(self.folder)
        if not self.hookpoint:
            if len(self.cache.hookpoints) > 1:
                raise InputError(
                    f"`hookpoint` must be given: the cache {self.folder} has"
                    f" {', '.join(self.cache.hookpoints)}."
                )
            self.hookpoint = self.cache.hookpoints[0]
        self.cache.check_hookpoint(self.hookpoint)

    @property
    def d_model(self) -> int:
        """Width of the rows; known after `setup`."""
        return self.cache.d_model(self.hookpoint)

    @property
    def moments(self) -> Moments:
        """Mean and second moments of the train rows; known after `setup`."""
        if self._moments is None:
            self._moments = self.cache.moments(self.hookpoint)
        return self._moments

    def train_dataloader(self) -> TrainLoader:
        """Shuffled batches of the train split, resumable."""
        trainer = self.trainer
        rank, world_size = (trainer.global_rank, trainer.world_size) if trainer else (0, 1)
        seed = torch.initial_seed()  # what seed_everything set, however much has been drawn since
        return TrainLoader(self.cache, self.hookpoint, self.batch_size, seed, rank, world_size)

    def val_dataloader(self) -> HeldOutLoader:
        """The held-out split in sequence order."""
        return HeldOutLoader(self.cache, self.hookpoint, self.batch_size)

    def test_dataloader(self) -> HeldOutLoader:
        """The same rows as in validation."""
        return self.val_dataloader()


class TrainLoader:
    """Batches of the train split, endlessly; one iteration is about one pass over the rows.

    A batch depends on the seed and on the number of batches given out before it, and on nothing else,
    so saving these two resumes exactly.
    """

    def __init__(
        self, cache: ActivationCache, hookpoint: str, batch_size: int, seed: int, rank: int, world_size: int
    ) -> None:
        if batch_size % world_size:
            raise InputError(f"`batch_size`={batch_size} must be a multiple of the {world_size} ranks.")
        self._shards = cache.shards("train")
        self._hookpoint = hookpoint
        self._d_model = cache.d_model(hookpoint)
        self._batch_size, self._seed = batch_size, seed
        self._sampler = self._make_sampler()
        self._rank, self._world_size = rank, world_size
        self._step = 0

    def __len__(self) -> int:
        """Batches in one iteration."""
        return max(1, self._sampler.n_rows // self._sampler.batch_size)

    def __iter__(self) -> Iterator[RowBatch]:
        """From the present position to the end of the iteration it lies in."""
        for _ in range(len(self) - self._step % len(self)):
            self._step += 1
            yield self._batch(self._step - 1)

    def state_dict(self) -> dict[str, Any]:
        """The position and the seed of the order."""
        return {"step": self._step, "seed": self._seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a saved position, in the saved order."""
        self._step, self._seed = state["step"], state["seed"]
        self._sampler = self._make_sampler()

    def _make_sampler(self) -> RowSampler:
        return RowSampler([shard.rows for shard in self._shards], self._batch_size, self._seed)

    def _batch(self, step: int) -> RowBatch:
        x: torch.Tensor | None = None
        for part in self._sampler.batch(step):
            rows = self._shards[part.shard].tensor(self._hookpoint)
            if x is None:
                x = rows.new_empty(self._sampler.batch_size // self._world_size, self._d_model)
            mine = part.places % self._world_size == self._rank
            x[part.places[mine] // self._world_size] = rows[part.rows[mine]]
        assert x is not None, "a batch has at least one row"
        return RowBatch(x, None, None)


class HeldOutLoader:
    """All held-out rows, in sequence order."""

    def __init__(self, cache: ActivationCache, hookpoint: str, batch_size: int) -> None:
        self._cache, self._hookpoint, self._batch_size = cache, hookpoint, batch_size

    def __len__(self) -> int:
        """Number of batches."""
        return sum(-(-shard.rows // self._batch_size) for shard in self._cache.shards("held_out"))

    def __iter__(self) -> Iterator[RowBatch]:
        """The batches, each with the origin of its rows."""
        return self._cache.batches("held_out", self._hookpoint, self._batch_size)


def cache_folder(cache: str | None, source: Source | None) -> Path:
    """Where the cache lies: as named, or a name made from the source.

    Raises:
        InputError: if neither is given.
    """
    if cache is not None:
        return Path(cache)
    if source is None:
        raise InputError("`data.cache` or `data.source` must be given: a folder, or what to harvest.")
    digest = hashlib.sha256(json.dumps(asdict(source), sort_keys=True).encode()).hexdigest()[:8]
    name = "-".join([Path(source.model).name or "model", *source.hookpoints, digest])
    return Path("caches") / name


def open_or_harvest(folder: Path, source: Source | None, device: str | None = None) -> ActivationCache:
    """Opens a finished cache, continues an unfinished one, makes a missing one.

    Raises:
        InputError: if the cache is missing or unfinished and there is no source, or if it was made
            from another source (the differing keys are named).
    """
    if (folder / "manifest.json").is_file():
        manifest = read_manifest(folder)
        if source is not None:
            _check_same_source(folder, manifest, source)
        if manifest.get("finished") or source is None:
            return ActivationCache(folder)
    elif source is None:
        raise InputError(
            f"`cache` {folder} does not exist and there is no `data.source` to make it from; give"
            " `data.source.model`, `data.source.dataset` and `data.source.hookpoints`, or another folder."
        )
    return harvest(source, folder, device or ("cuda" if torch.cuda.is_available() else "cpu"))


def _check_same_source(folder: Path, manifest: dict[str, Any], source: Source) -> None:
    cached = manifest.get("source") or {}
    wanted = asdict(source)
    differing = [
        f"{key} (cache: {cached.get(key)!r}, config: {wanted[key]!r})"
        for key in wanted
        if cached.get(key) != wanted[key]
    ]
    if differing:
        raise InputError(
            f"the cache {folder} was made from another source; it differs in {'; '.join(differing)}."
            " Name another `data.cache`, or leave it out."
        )
