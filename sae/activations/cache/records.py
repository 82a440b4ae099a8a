"""A small file beside each finished shard: what a harvest has done, for whoever goes on with it."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from typing import Any

from sae.activations.cache.places import Place
from sae.errors import InputError

STALLED_AFTER = 900.0
"""Seconds without a new shard after which a rank stops waiting for the others."""
_POLL = 0.2


def write_record(place: Place, record: Mapping[str, Any]) -> None:
    """Says that a shard is finished; written after it."""
    place.write(_name(record["file"]), [json.dumps(record).encode()])


def read_record(place: Place, file: str, sizes: Mapping[str, int]) -> dict[str, Any] | None:
    """The record of a finished shard that is there as long as it was written; else None.

    Args:
        place: of the cache.
        file: the shard.
        sizes: a listing of the place.
    """
    if file not in sizes or _name(file) not in sizes:
        return None
    try:
        record = json.loads(place.read(_name(file)))
    except FileNotFoundError:  # a rolling cache has just removed it
        return None
    return record if record["bytes"] == sizes[file] else None


def restore_records(place: Place, entries: Iterable[Mapping[str, Any]]) -> None:
    """Writes records of those shards of a finished cache that are still there as they were written."""
    sizes = place.sizes()
    for entry in entries:
        if sizes.get(entry["file"]) == entry["bytes"]:
            write_record(place, {"skipped": [], **entry})


def finished_records(place: Place, files: Iterable[str]) -> dict[str, dict[str, Any]]:
    """The records of those shards that are finished."""
    sizes = place.sizes()
    found = {file: read_record(place, file, sizes) for file in files}
    return {file: record for file, record in found.items() if record is not None}


def wait_for_shards(place: Place, files: list[str]) -> dict[str, dict[str, Any]]:
    """Waits for the shards of other ranks; returns the records of all.

    Raises:
        InputError: if nothing new has come for a long time, as when another rank has died.
    """
    last, since = -1, time.monotonic()
    while True:
        sizes = place.sizes()
        there = sum(file in sizes and _name(file) in sizes for file in files)
        if there == len(files) and len(records := finished_records(place, files)) == len(files):
            return records
        if there != last:
            last, since = there, time.monotonic()
        if time.monotonic() - since > STALLED_AFTER:
            missing = [file for file in files if _name(file) not in sizes]
            raise InputError(
                f"{len(missing)} shards of {place} are missing ({missing[0]} first) and none has come for"
                f" {STALLED_AFTER / 60:.0f} minutes: has another rank died? Run the same command again; it"
                " keeps what is finished."
            )
        time.sleep(_POLL)


def remove_records(place: Place, files: Iterable[str]) -> None:
    """Removes the records, once the manifest has them."""
    for file in files:
        place.remove(_name(file))


def _name(file: str) -> str:
    return file.removesuffix(".safetensors") + ".json"
