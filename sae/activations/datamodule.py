"""The LightningDataModule: finds or makes the cache, and feeds its rows; needs no language model to read."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor

from sae.activations.cache import ActivationCache, read_manifest
from sae.activations.cache.format import has_manifest, is_whole
from sae.activations.cache.places import Place, RemotePlace, is_url, place_at
from sae.activations.cache.supply import Bounded, Fetched
from sae.activations.harvest import harvest
from sae.activations.loaders import HeldOutLoader, RowsOf, TrainLoader
from sae.activations.ranks import ALONE, Ranks, launched_ranks
from sae.activations.rolling import RollingShards
from sae.activations.sampler import SHUFFLE_ROWS
from sae.activations.source import Source, parse_bytes
from sae.activations.synthetic.config import WorldSource
from sae.activations.synthetic.world import World
from sae.activations.synthetic.written import write_world
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
        shuffle_rows: int = SHUFFLE_ROWS,
        workers: int = 1,
        local_disk: str | int = "50GB",
        world: WorldSource | None = None,
    ) -> None:
        """Describes the data; nothing is read yet.

        Args:
            cache: folder or URL (s3://...) of the cache; null = caches/<name made from the source>.
            source: what to harvest where the cache is missing; null = the cache must exist.
            hookpoint: which one to train on; null = the cache's only one.
            batch_size: rows (tokens) per training step, over all ranks.
            shuffle_rows: rows mixed together in memory when read; they come from up to 32 shards at once.
            workers: threads that gather batches ahead of training; 0 = none.
            local_disk: bytes of this machine's disk that shards fetched from a URL may take.
            world: a world of known features to write rows of where the cache is missing, instead of a source.
        """
        super().__init__()
        if source is not None:
            source.check()
        if world is not None:
            world.config().check()
        self.source, self.world = source, world
        self.location = cache_folder(cache, source, world)
        self.batch_size, self.shuffle_rows, self.workers = batch_size, shuffle_rows, workers
        self.hookpoint = hookpoint or ""
        self.local_disk = parse_bytes(str(local_disk), "local_disk")
        self._loader: TrainLoader | None = None
        self._moments: Moments | None = None
        self._position: dict[str, Any] = {}

    def prepare_data(self) -> None:
        """Harvests the cache where it is missing or unfinished.

        Called before `fit`, by all ranks that torchrun or srun started: they share the work. Lightning
        calls it in one process of each node: that one works alone.
        """
        if self.world is not None:
            self._write_world(self.world)
            return
        open_or_harvest(self._place(), self.source, ranks=None if self.trainer is None else ALONE)

    def _write_world(self, world: WorldSource) -> None:
        """By the first rank; the others wait for it when they start to train together."""
        if launched_ranks().rank == 0:
            write_world(World(world.config()), self._place(), world.n_rows, world.held_out)

    def setup(self, stage: str | None = None) -> None:
        """Opens the cache and settles the hookpoint."""
        self.cache = ActivationCache(self._place())
        if not self.hookpoint:
            if len(self.cache.hookpoints) > 1:
                raise InputError(
                    f"`hookpoint` must be given: the cache {self.location} has"
                    f" {', '.join(self.cache.hookpoints)}."
                )
            self.hookpoint = self.cache.hookpoints[0]
        self.cache.check_hookpoint(self.hookpoint)

    def _place(self) -> Place:
        return place_at(self.location, self.local_disk)

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

    def first_rows(self, n: int) -> Tensor:
        """Up to n train rows, those first on disk; held-out ones where train shards come and go."""
        split = "held_out" if self.cache.is_rolling else "train"
        return next(iter(self.cache.batches(split, self.hookpoint, n))).x.float()

    def train_dataloader(self) -> TrainLoader:
        """Shuffled batches of the train split, resumable."""
        trainer = self.trainer
        ranks = self._ranks
        device = trainer.strategy.root_device if trainer else torch.device("cpu")
        bounded = self._bounded(device, ranks)
        self._loader = TrainLoader(
            bounded.shards if isinstance(bounded, RollingShards) else self.cache.shards("train"),
            RowsOf(self.hookpoint, self.d_model, self.cache.encoding.row_dtype),
            self.batch_size,
            torch.initial_seed(),  # what seed_everything set, however much has been drawn since
            ranks,
            rows_per_context=self.cache.rows_per_context,
            shuffle_rows=self.shuffle_rows,
            workers=self.workers,
            pin_memory=device.type == "cuda",
            bounded=bounded,
        )
        if self._position:
            self._loader.load_state_dict(self._position)
            self._position = {}
        return self._loader

    @property
    def waited_s(self) -> float:
        """Seconds that training has waited for batches in this process."""
        return self._loader.waited_s if self._loader else 0.0

    def state_dict(self) -> dict[str, Any]:
        """Where training stands in the order of rows: after the batches finished, not those fetched."""
        if self._loader is None or self.trainer is None:
            return {}
        done = self.trainer.fit_loop.epoch_loop.batch_progress.total.completed
        return {**self._loader.state_dict(), "step": done}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remembers where the next `train_dataloader` begins."""
        self._position = state_dict

    @property
    def _ranks(self) -> Ranks:
        """This process among those that train together."""
        return Ranks(self.trainer.global_rank, self.trainer.world_size) if self.trainer else ALONE

    def _bounded(self, device: torch.device, ranks: Ranks) -> Bounded | None:
        """Where train shards come and go, if they do."""
        if self.cache.is_rolling:
            if self.source is None:
                raise InputError(
                    f"the cache {self.location} is a rolling one: training on it needs `data.source`, to"
                    " harvest its shards from."
                )
            return RollingShards(self.source, self.cache.place, device, ranks)
        if isinstance(self.cache.place, RemotePlace):
            node = Ranks(self.trainer.local_rank, self.trainer.num_devices) if self.trainer else ALONE
            return Fetched(self.cache.place, self.cache.place.limit, node)
        return None

    def teardown(self, stage: str | None = None) -> None:
        """Ends what was done ahead of training."""
        if stage == "fit" and self._loader is not None:
            self._loader.close()
            self._loader = None

    def val_dataloader(self) -> HeldOutLoader:
        """The held-out split in sequence order; ranks share every batch."""
        return HeldOutLoader(self.cache, self.hookpoint, self.batch_size, self._ranks)

    def test_dataloader(self) -> HeldOutLoader:
        """The same rows as in validation."""
        return self.val_dataloader()


def cache_folder(cache: str | None, source: Source | None, world: WorldSource | None = None) -> str:
    """Where the cache lies: as named, or a name made from the source or the world.

    Raises:
        InputError: if none of them is given, or both a source and a world.
    """
    if source is not None and world is not None:
        raise InputError("`data.source` and `data.world` cannot both be given; leave one out.")
    if cache is not None:
        return cache if is_url(cache) else str(Path(cache))
    if world is not None:
        return str(Path("caches") / world.folder_name())
    if source is None:
        raise InputError("`data.cache` or `data.source` must be given: a folder, or what to harvest.")
    digest = hashlib.sha256(json.dumps(source.identity(), sort_keys=True).encode()).hexdigest()[:8]
    name = "-".join([Path(source.model).name or "model", *source.hookpoints, digest])
    return str(Path("caches") / name)


def open_or_harvest(
    location: str | Path | Place,
    source: Source | None,
    device: str | None = None,
    ranks: Ranks | None = None,
) -> ActivationCache:
    """Opens a finished cache, continues an unfinished one, makes a missing one or what is lost of one.

    Raises:
        InputError: if the cache is missing or unfinished and there is no source, or if it was made
            from another source (the differing keys are named).
    """
    place = place_at(location)
    if has_manifest(place):
        manifest = read_manifest(place)
        if source is not None:
            _check_same_source(str(place), manifest, source)
        usable = manifest.get("finished") or ("rolling" in manifest and source and source.disk is not None)
        if source is None or (usable and is_whole(place, manifest)):
            return ActivationCache(place)
    elif source is None:
        raise InputError(
            f"`cache` {place} does not exist and there is no `data.source` to make it from; give"
            " `data.source.model`, `data.source.dataset` and `data.source.hookpoints`, or another folder."
        )
    return harvest(source, place, device or _device(ranks or launched_ranks()), ranks)


def _device(ranks: Ranks) -> str:
    """A GPU for each rank of a node, where there are GPUs."""
    if not torch.cuda.is_available():
        return "cpu"
    return f"cuda:{ranks.rank % torch.cuda.device_count()}"


def _check_same_source(location: str, manifest: dict[str, Any], source: Source) -> None:
    cached, wanted = manifest.get("source") or {}, source.identity()
    # Either may lack a key that has its default: caches of earlier versions, and `Source.identity`.
    default = asdict(Source())
    pairs = {key: (cached.get(key, default[key]), wanted.get(key, default[key])) for key in default}
    differing = [
        f"{key} (cache: {there!r}, config: {here!r})" for key, (there, here) in pairs.items() if there != here
    ]
    if differing:
        raise InputError(
            f"the cache {location} was made from another source; it differs in {'; '.join(differing)}."
            " Name another `data.cache`, or leave it out."
        )
