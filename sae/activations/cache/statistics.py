"""Mean and second moments of the train rows, added up shard by shard and never lost on the way."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from safetensors.torch import load as from_safetensors_bytes
from torch import Tensor

from sae.activations.cache.format import MOMENTS
from sae.activations.cache.places import Place
from sae.activations.cache.tensor_file import write_tensors
from sae.errors import InputError
from sae.ops.moments import StreamingMoments

STALLED_AFTER = 900.0
"""Seconds to wait for the sums of other ranks."""
_POLL = 0.2
_SAVED_PER_WRITTEN = 1 / 20  # bytes of running sums saved per byte of shards: a second moment may be large


class RunningStatistics:
    """The sums of one rank over the shards that it wrote, saved now and then beside them.

    Each shard is added up by itself and the sums are then joined in the order of shards, so that an
    interrupted harvest ends with the same bits as an unbroken one.
    """

    def __init__(self, place: Place, rank: int, hookpoints: Iterable[str]) -> None:
        """Continues from what an earlier harvest saved, if it did."""
        self._place, self._file = place, f"moments-{rank:05d}.partial"
        self.shards: list[str] = []
        """Shards that are counted."""
        self._sums = {name: StreamingMoments() for name in hookpoints}
        self._unsaved = 0
        if place.size(self._file) is not None:
            self.shards, self._sums = _read(place, self._file, self._sums)

    def add(self, file: str, of_shard: Mapping[str, StreamingMoments], n_bytes: int) -> None:
        """Counts a shard that lies on disk as a whole."""
        for name, sums in of_shard.items():
            self._sums[name].merge(sums)
        self.shards.append(file)
        self._unsaved += n_bytes
        size = sum(t.nbytes for sums in self._sums.values() for t in sums.state_dict().values())
        if size <= self._unsaved * _SAVED_PER_WRITTEN:
            self.save()

    def save(self) -> None:
        """Writes the sums as they stand."""
        tensors = {
            f"{name}.{key}": t for name, sums in self._sums.items() for key, t in sums.state_dict().items()
        }
        write_tensors(self._place, self._file, tensors, {"shards": json.dumps(self.shards)})
        self._unsaved = 0


def counted_elsewhere(place: Place, rank: int) -> set[str]:
    """Shards that other ranks have counted, those of an earlier harvest with more ranks included."""
    mine = f"moments-{rank:05d}.partial"
    return {s for file in _partial_files(place) if file != mine for s in _read(place, file, {})[0]}


def wait_for_statistics(place: Place, files: Iterable[str]) -> None:
    """Waits until every shard is counted by the rank that wrote it, which saves its sums last of all.

    Raises:
        InputError: if nothing comes for a long time, as when another rank has died.
    """
    wanted, begin = set(files), time.monotonic()
    while not wanted <= {s for file in _partial_files(place) for s in _read(place, file, {})[0]}:
        if time.monotonic() - begin > STALLED_AFTER:
            raise InputError(
                f"the statistics of {place} lack shards that other ranks wrote: has one died? Run the same"
                " command again; it keeps what is finished."
            )
        time.sleep(_POLL)


def join_statistics(place: Place, hookpoints: Iterable[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Joins the sums of all ranks into moments.safetensors.

    Returns:
        The file's manifest entry, and the `statistics` of the manifest.
    """
    # The ranks' files are joined, so each shard must have been counted by one of them.
    joined = {name: StreamingMoments() for name in hookpoints}
    for file in _partial_files(place):
        for name, sums in _read(place, file, joined)[1].items():
            joined[name].merge(sums)
    tensors: dict[str, Tensor] = {}
    statistics: dict[str, Any] = {}
    for name, sums in joined.items():
        moments = sums.moments()
        tensors |= {f"{name}.mean": moments.mean, f"{name}.second": moments.second}
        statistics[name] = {
            "rows": moments.count,
            "mean": moments.mean.tolist(),
            "mean_squared_norm": moments.mean_squared_norm,
        }
    return write_tensors(place, MOMENTS, tensors), statistics


def remove_partial(place: Place) -> None:
    """Removes the sums of single ranks, once they are joined."""
    for file in _partial_files(place):
        place.remove(file)


def moments_of_rows(x: Iterable[Tensor], device: torch.device) -> StreamingMoments:
    """Sums of some rows, computed where the model is: float64 products are slow on a CPU."""
    sums = StreamingMoments()
    for rows in x:
        sums.add(rows.to(device))
    return StreamingMoments.from_state_dict(sums.state_dict())


def _partial_files(place: Place) -> list[str]:
    return sorted(name for name in place.sizes() if name.endswith(".partial"))


def _read(place: Place, file: str, names: Iterable[str]) -> tuple[list[str], dict[str, StreamingMoments]]:
    data = place.read(file)
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    tensors = from_safetensors_bytes(data)
    sums = {}
    for name in names:
        keys = ("count", "sum", "products")
        found = {key: tensors[f"{name}.{key}"] for key in keys if f"{name}.{key}" in tensors}
        sums[name] = StreamingMoments.from_state_dict(found)
    return json.loads(header["__metadata__"]["shards"]), sums
