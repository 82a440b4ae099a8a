"""A cache that is larger than the disk: shards are harvested ahead of training and removed behind it."""

from __future__ import annotations

import contextlib
import time

import torch

from sae.activations.cache import Shard
from sae.activations.cache.encoding import row_bytes
from sae.activations.cache.places import Place
from sae.activations.cache.plan import PlannedShard
from sae.activations.cache.records import read_record, remove_records
from sae.activations.cache.supply import Bounded
from sae.activations.harvest_begun import begin_harvest
from sae.activations.ranks import ALONE, Ranks
from sae.activations.source import Source

_HEADER_BYTES = 4096  # of a shard file, at most
_POLL = 0.05


class RollingShards(Bounded):
    """The train shards of a rolling cache: a shard is the same bytes whenever it is harvested.

    So batches, and resuming, are those of a cache that is kept whole. Several ranks that train together
    each harvest their share of a window, into one folder that all of them see.
    """

    def __init__(self, source: Source, place: Place, device: torch.device, ranks: Ranks = ALONE) -> None:
        """Loads the language model; shards that an earlier training left are used.

        Args:
            source: of the cache, with `disk`.
            place: of the cache, begun by `harvest`.
            device: where the language model runs.
            ranks: this process among those that train together.

        Raises:
            InputError: if the model cannot be loaded or is not the one that the cache was begun with.
        """
        self.ranks = ranks
        begun = begin_harvest(source, place, str(device), ranks)
        self._writer = begun.writer
        self._planned = {s.file: s for s in begun.writer.plan.shards if s.split == "train"}
        each = row_bytes(begun.writer.d_model, begun.writer.encoding)
        self.shards = [self._shard(planned, each) for planned in self._planned.values()]
        others = sum(size for file, size in place.sizes().items() if file not in self._planned)
        self.limit = (source.disk_bytes() or 0) - others
        self._hooks = contextlib.ExitStack()
        self._produce = self._hooks.enter_context(begun.producing())

    def _shard(self, planned: PlannedShard, bytes_per_row: int) -> Shard:
        rows = self._writer.plan.n_rows(planned)
        size = rows * bytes_per_row + _HEADER_BYTES
        entry = {"file": planned.file, "split": "train", "rows": rows, "bytes": size}
        return Shard(entry, self._writer.place, self._writer.encoding)

    def is_there(self, shard: Shard) -> bool:
        """Whether its file has been renamed into place."""
        return self._writer.place.size(shard.file) is not None

    def bring(self, shard: Shard) -> None:
        """Harvests it, or takes the record of one that is there."""
        place, planned = self._writer.place, self._planned[shard.file]
        mine = planned.index % self.ranks.world == self.ranks.rank
        record = read_record(place, shard.file, place.sizes())
        while record is None and not mine:  # another rank has renamed the file and writes its record now
            time.sleep(_POLL)
            record = read_record(place, shard.file, place.sizes())
        if record is None:
            record = self._writer.write(planned, self._writer.fill(planned, self._produce))
        shard.describe(record)

    def remove(self, shard: Shard) -> None:
        """The record first: a shard with a record is whole."""
        remove_records(self._writer.place, [shard.file])
        self._writer.place.remove(shard.file)

    def close(self) -> None:
        """Lets go of the language model."""
        self._hooks.close()
