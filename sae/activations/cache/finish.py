"""The last step of writing a cache: statistics, order file, and the manifest that says it is whole."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from sae.activations.cache.format import ORDER, write_manifest
from sae.activations.cache.places import Place
from sae.activations.cache.plan import Plan
from sae.activations.cache.records import remove_records
from sae.activations.cache.statistics import join_statistics, remove_partial
from sae.activations.cache.tensor_file import Pieces, write_tensors
from sae.errors import InputError


def finish_cache(
    place: Place, manifest: Mapping[str, Any], plan: Plan, records: Mapping[str, Mapping[str, Any]]
) -> None:
    """Writes what is known only when all shards are there, and last the manifest with `finished`.

    So no partial cache looks whole.

    Args:
        place: of the cache.
        manifest: as begun; its `files` are those written so far.
        plan: of all shards.
        records: of all shards.
    """
    moments, statistics = join_statistics(place, manifest["hookpoints"])
    entries = [_entry(records[shard.file]) for shard in plan.shards]
    rows = {
        split: sum(entry["rows"] for entry in entries if entry["split"] == split)
        for split in ("train", "held_out")
    }
    for name, about in statistics.items():
        if about["rows"] != rows["train"]:
            remove_partial(place)
            raise InputError(
                f"the statistics of {name} count {about['rows']:,} rows, the train split has"
                f" {rows['train']:,}; run the same command again: it counts them anew."
            )
    order = Pieces(torch.int64, (rows["train"],), _order(plan, records))
    written = [write_tensors(place, ORDER, {"order": order}), moments]
    names = {entry["file"] for entry in written}
    kept = [entry for entry in manifest["files"] if entry["file"] not in names]
    splits = {name: {**about, "rows": rows[name]} for name, about in manifest["splits"].items()}
    finished = {
        "splits": splits,
        "rows_skipped": sum(len(record["skipped"]) for record in records.values()),
        "statistics": statistics,
        "files": [*kept, *written],
        "shards": entries,
        "finished": True,
    }
    manifest = {key: value for key, value in manifest.items() if key != "rolling"}
    write_manifest(place, {**manifest, **finished})
    remove_records(place, records)
    remove_partial(place)


def begin_rolling_manifest(
    place: Place, manifest: Mapping[str, Any], held_out: Mapping[str, Mapping[str, Any]], train: list[str]
) -> None:
    """The manifest of a cache whose train shards come and go; it is never `finished`.

    Args:
        place: of the cache.
        manifest: as begun.
        held_out: records of the held-out shards, which stay.
        train: files of all train shards.
    """
    moments, statistics = join_statistics(place, manifest["hookpoints"])
    rolling = {
        "rolling": {"train": train},
        "statistics": statistics,
        "files": [*manifest["files"], moments],
        "shards": [_entry(record) for record in held_out.values()],
    }
    write_manifest(place, {**manifest, **rolling})
    remove_records(place, held_out)
    remove_partial(place)


def _entry(record: Mapping[str, Any]) -> dict[str, Any]:
    entry = {key: record[key] for key in ("file", "split", "rows", "bytes", "checksum")}
    return entry | ({"skipped": record["skipped"]} if record["skipped"] else {})


def _order(plan: Plan, records: Mapping[str, Mapping[str, Any]]) -> Iterator[Tensor]:
    for shard in plan.shards:
        if shard.split == "train":
            origin = plan.layout(shard).origin
            skipped: Iterable[int] = records[shard.file]["skipped"]
            yield origin[~torch.isin(origin, torch.tensor(list(skipped), dtype=origin.dtype))]
