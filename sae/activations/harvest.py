"""Running a language model over packed text and writing its residual stream into a cache."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

from sae.activations.cache import ActivationCache
from sae.activations.cache.encoding import row_bytes
from sae.activations.cache.finish import begin_rolling_manifest, finish_cache
from sae.activations.cache.places import Place, RemotePlace, explaining_a_full_disk, place_at
from sae.activations.cache.plan import PlannedShard
from sae.activations.cache.records import wait_for_shards
from sae.activations.cache.statistics import wait_for_statistics
from sae.activations.cache.writer import write_shards
from sae.activations.harvest_begun import (
    Begun,
    begin_harvest,
    discard_unless_shards,
    unfinished_again,
    wait_for_manifest,
)
from sae.activations.ranks import Ranks, launched_ranks
from sae.activations.source import Source
from sae.errors import InputError
from sae.files import format_bytes

STATISTICS_ROWS = 2**20
"""Train rows that the statistics of a rolling cache are taken from, at least."""


def harvest(
    source: Source, location: str | Path | Place, device: str = "cpu", ranks: Ranks | None = None
) -> ActivationCache:
    """Makes the cache of `source`, or continues an interrupted harvest of it.

    Contexts are dealt to shards at random and each shard's rows are spread before they are written (see
    `Plan`), so reading from end to end already mixes contexts; held-out rows keep sequence order. Shards
    that are finished are kept, also those of a finished cache of which others were lost. Several ranks
    each write their share; the first one tokenises, and finishes when all have written theirs.

    Args:
        source: what to harvest.
        location: folder or URL of the cache.
        device: where the language model runs.
        ranks: this process among those that harvest together; None = as torchrun or srun started it.

    Raises:
        InputError: for anything wrong with the source, too little disk, or activations that are not
            finite.
    """
    ranks = ranks or launched_ranks()
    place = place_at(location)
    with explaining_a_full_disk(place):
        return _harvest(source, place, device, ranks)


def _harvest(source: Source, place: Place, device: str, ranks: Ranks) -> ActivationCache:
    begun = begin_harvest(source, place, device, ranks)
    if begun.manifest["finished"]:  # by the other ranks, which had nothing left for this one
        return ActivationCache(place)
    limit = source.disk_bytes()
    if limit is not None and limit < begun.total_bytes():
        _begin_rolling(begun, ranks)
        return ActivationCache(place)
    plan = begun.writer.plan
    if ranks.rank == 0:
        if "rolling" in begun.manifest:
            begun.manifest = unfinished_again(place, begun.manifest)
        _checked(begun, lambda: _check_disk(begun))
    with begun.producing() as produce:
        write_shards(begun.writer, plan.shards, ranks, produce)
    if ranks.rank == 0:
        records = wait_for_shards(place, [shard.file for shard in plan.shards])
        wait_for_statistics(place, [shard.file for shard in plan.shards if shard.split == "train"])
        finish_cache(place, begun.manifest, plan, records)
    else:
        wait_for_manifest(place, begun.manifest["source_hash"], lambda m: bool(m["finished"]))
    return ActivationCache(place)


def _begin_rolling(begun: Begun, ranks: Ranks) -> None:
    """Writes what a training starts from: held-out shards, and the statistics of the first train shards.

    The train shards come and go later (see `rolling.py`). Their exact statistics would take a pass over
    all of the text; those of a million rows are those of a fair sample, contexts being dealt at random.
    """
    place, plan, manifest = begun.writer.place, begun.writer.plan, begun.manifest
    if "rolling" in manifest:
        return
    train = [shard for shard in plan.shards if shard.split == "train"]
    held_out = [shard for shard in plan.shards if shard.split == "held_out"]
    rows = itertools.accumulate(plan.n_rows(shard) for shard in train)
    wanted = 1 + sum(n < STATISTICS_ROWS for n in rows)
    each = max(plan.n_rows(shard) for shard in train) * row_bytes(begun.writer.d_model, begun.writer.encoding)
    affordable = (begun.source.disk_bytes() or 0) // 3 // each
    first = [*held_out, *train[: max(1, min(wanted, affordable))]]
    if ranks.rank == 0:
        _checked(begun, lambda: _check_rolling(begun, first))
    with begun.producing() as produce:
        write_shards(begun.writer, first, ranks, produce)
    if ranks.rank > 0:
        wait_for_manifest(place, manifest["source_hash"], lambda m: "rolling" in m)
        return
    records = wait_for_shards(place, [shard.file for shard in first])
    wait_for_statistics(place, [shard.file for shard in first if shard.split == "train"])
    written = {shard.file: records[shard.file] for shard in held_out}
    begin_rolling_manifest(place, manifest, written, [shard.file for shard in train])


def _checked(begun: Begun, check: Callable[[], None]) -> None:
    """Runs a check; a harvest that it refuses leaves nothing behind but shards of an earlier one."""
    try:
        check()
    except InputError:
        discard_unless_shards(begun.writer.place)
        raise


def _check_rolling(begun: Begun, first: list[PlannedShard]) -> None:
    """Raises `InputError` for what cannot roll, or cannot in so little."""
    source, writer = begun.source, begun.writer
    if isinstance(writer.place, RemotePlace):
        raise InputError(
            f"`disk` bounds a cache on this machine, but `cache` is {writer.place}; leave one out."
        )
    if source.non_finite == "skip":
        raise InputError("`disk` needs to know how many rows a shard has: set `non_finite` to error.")
    limit = source.disk_bytes() or 0
    each = row_bytes(writer.d_model, writer.encoding)
    needed = sum(writer.plan.n_rows(shard) for shard in first) * each
    apart = sum(writer.plan.n_rows(shard) for shard in first if shard.split == "held_out") * each
    rows = sum(writer.plan.n_rows(shard) for shard in writer.plan.shards)
    print(
        f"cache {writer.place}: {rows:,} rows of {', '.join(writer.d_model)}, {each:,} bytes a row,"
        f" {format_bytes(begun.total_bytes())} in all, rolling within {format_bytes(limit)};"
        f" held-out rows and a first sample take {format_bytes(needed)}",
        flush=True,
    )
    if needed > limit:
        raise InputError(
            f"`disk` is {format_bytes(limit)}, but the held-out rows take {format_bytes(apart)} and a first"
            f" shard of train rows {format_bytes(needed - apart)}; raise it."
        )


def _check_disk(begun: Begun) -> None:
    """Prints what the cache takes.

    Raises:
        InputError: if what is still to come does not fit.
    """
    writer, manifest = begun.writer, begun.manifest
    rows = sum(writer.plan.n_rows(shard) for shard in writer.plan.shards)
    each = row_bytes(writer.d_model, writer.encoding)
    to_come = writer.bytes_to_come() + 8 * rows  # 8: the order file
    free = writer.place.free_bytes()
    print(
        f"cache {writer.place}: {rows:,} rows of {', '.join(writer.d_model)} as {manifest['dtype']},"
        f" {each:,} bytes a row, {format_bytes(begun.total_bytes())} in all, {format_bytes(to_come)} to come,"
        f" {'no limit' if free is None else format_bytes(free)} free",
        flush=True,
    )
    if free is not None and to_come > free:
        raise InputError(
            f"the harvest needs {format_bytes(to_come)} more in {writer.place},"
            f" {format_bytes(to_come - free)} more than is free; lower `n_tokens`, choose a smaller `dtype`"
            " (int8), bound it with `disk`, or name another `cache` folder."
        )
