"""A world's rows as an activation cache, with the truth beside them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load, save
from torch import Tensor

from sae.activations.cache import ActivationCache
from sae.activations.cache.places import Place, place_at
from sae.activations.exchange.arrays import Array
from sae.activations.exchange.imported import import_activations
from sae.activations.synthetic.config import WorldConfig
from sae.activations.synthetic.planted import PlantedRows
from sae.activations.synthetic.world import BLOCK, World
from sae.errors import InputError

CONFIG, TRUTH = "world.json", "world.safetensors"
_FORMAT = "sae-world/1"


class CachedTruth(NamedTuple):
    """A cache's world, and which of its rows are held out."""

    world: World
    n_train: int
    """Rows 0 to n_train of the world are the train split."""
    n_rows: int
    """Rows n_train to n_rows are the held-out split, in order."""

    def held_out(self, batch_size: int = BLOCK) -> Iterator[PlantedRows]:
        """The held-out rows, made again with their code: in float32, as the cache was given them."""
        for begin in range(self.n_train, self.n_rows, batch_size):
            yield self.world.rows(begin, min(begin + batch_size, self.n_rows))


def write_world(
    world: World, location: str | Path | Place, n_rows: int, held_out: float = 0.05, hookpoint: str = "acts"
) -> ActivationCache:
    """Writes rows of a world as a cache, or continues one that was interrupted; a finished one is left.

    Rows are made as they are written, never all at once, on the CPU. Beside them lie world.json (the
    configuration) and world.safetensors (directions, parents, rates, mean magnitudes, bias). The rows'
    code is not stored: `cached_truth` makes it again.

    Args:
        world: the world.
        location: folder or URL of the cache.
        n_rows: rows over both splits.
        held_out: share held out: the last rows.
        hookpoint: what they are called.

    Raises:
        InputError: if the location holds something else, another world's rows among it.
    """
    if n_rows < 2:
        raise InputError(f"`n_rows` must be at least 2, got {n_rows}.")
    place = place_at(location)
    _check_same_world(place, world.config)
    # Runs of whole blocks: the writer takes them in an order of its own, and each is drawn once.
    cache = import_activations(
        _WorldRows(world, n_rows), place, hookpoint=hookpoint, context_length=BLOCK, held_out=held_out
    )
    if place.size(CONFIG) is None:
        place.write(TRUTH, [save(_truth(world))])
        place.write(CONFIG, [_describe(world.config)])  # last: who finds it finds the other too
    return cache


def is_of_a_world(location: str | Path | Place) -> bool:
    """Whether a cache was written from a world, so that `cached_truth` knows it."""
    return place_at(location).size(CONFIG) is not None


def cached_truth(location: str | Path | Place) -> CachedTruth:
    """The world that a cache was written from, with the directions that its rows were made with.

    Raises:
        InputError: if the cache was not made from a world.
    """
    place = place_at(location)
    if not is_of_a_world(place):
        raise InputError(f"{place} was not made from a world (it has no {CONFIG}): its truth is not known.")
    told = json.loads(place.read(CONFIG))
    if told.pop("format", None) != _FORMAT:
        raise InputError(f"{place}: {CONFIG} is not of the format {_FORMAT}; make the cache again.")
    world = World(WorldConfig(**told), load(place.read(TRUTH))["directions"])
    cache = ActivationCache(place)
    n_train = cache.n_rows("train")
    return CachedTruth(world, n_train, n_train + cache.n_rows("held_out"))


def _check_same_world(place: Place, config: WorldConfig) -> None:
    if place.size(CONFIG) is None:
        return
    cached, wanted = json.loads(place.read(CONFIG)), config.identity()
    differing = [
        f"{key} (cache: {cached.get(key)}, config: {value})"
        for key, value in wanted.items()
        if cached.get(key) != value
    ]
    if differing:
        raise InputError(
            f"the cache {place} was made from another world; it differs in {'; '.join(differing)}. Name"
            " another `data.cache`, or leave it out."
        )


class _WorldRows(Array):
    """A world's rows as an array that is made as it is read."""

    def __init__(self, world: World, n_rows: int) -> None:
        self._world = world
        self.name = "world"
        self.shape = (n_rows, world.config.d_model)
        self.dtype = torch.float32

    def read(self, begin: int, end: int) -> Tensor:
        return self._world.rows(begin, end).x

    def identity(self) -> dict[str, Any]:
        return {"world": self._world.config.identity(), "rows": self.shape[0]}


def _truth(world: World) -> dict[str, Tensor]:
    return {
        "directions": world.directions,
        "parents": world.parents,
        "rates": world.rates,
        "mean_magnitudes": world.mean_magnitudes,
        "bias": world.bias,
    }


def _describe(config: WorldConfig) -> bytes:
    return (json.dumps({"format": _FORMAT, **config.identity()}, indent=2) + "\n").encode()
