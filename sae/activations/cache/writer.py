"""Writing a cache shard by shard, while the next shard is being computed; what is finished is kept."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import threadpoolctl
import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from sae.activations.cache.encoding import Encoding, row_bytes
from sae.activations.cache.places import Place, explaining_a_full_disk
from sae.activations.cache.plan import Layout, Plan, PlannedShard
from sae.activations.cache.records import finished_records, write_record
from sae.activations.cache.shard import Shard
from sae.activations.cache.statistics import RunningStatistics, counted_elsewhere, moments_of_rows
from sae.activations.cache.tensor_file import write_tensors
from sae.activations.ranks import Ranks
from sae.errors import InputError
from sae.ops.moments import StreamingMoments
from sae.ops.threads import background_threads

Produce = Callable[[Int[Tensor, " sequences"]], Iterable[Mapping[str, Float[Tensor, "some context d_model"]]]]
"""Given contexts, their activations at every hookpoint, some whole contexts at a time and in order."""

_CHUNK = 4096  # rows


class Filled(NamedTuple):
    """A shard in memory."""

    tensors: dict[str, Tensor]
    skipped: list[int]
    """Rows left out for not being finite: sequence * context_length + position of each."""


@dataclass
class ShardWriter:
    """Makes shard files out of activations.

    Rows go from the model straight to their places in a shard held in memory; a thread checks, counts,
    writes and syncs the finished one meanwhile. So two shards are in memory at most.
    """

    place: Place
    plan: Plan
    encoding: Encoding
    d_model: Mapping[str, int]
    """Width of each hookpoint."""
    document_ids: Int[Tensor, "sequences context"] | None = None
    """For messages: the document of each position."""
    non_finite: Literal["error", "skip"] = "error"
    device: torch.device = torch.device("cpu")
    """Where activations come from; second moments are computed there too."""
    doing: str = "harvest"
    """What is being done, for messages."""
    knows_sequences: bool = True
    """Whether sequence and position of each row are written; of mere rows nobody knows them."""

    def fill(self, shard: PlannedShard, produce: Produce, bar: tqdm | None = None) -> Filled:
        """A shard in memory, rows at their places.

        Raises:
            InputError: if a row is not finite and they are not to be skipped.
        """
        layout = self.plan.layout(shard)
        tensors: dict[str, Tensor] = {}
        context, n_done = self.plan.context_length, 0
        for group in _behind(self._encoded(produce(shard.sequences), layout), self.device):
            rows = len(next(iter(group.values())))
            places = layout.places[n_done : n_done + rows]
            for name, part in group.items():
                if name not in tensors:
                    tensors[name] = torch.empty(len(layout.origin), *part.shape[1:], dtype=part.dtype)
                tensors[name].index_copy_(0, places, part)
            n_done += rows
            if bar is not None:
                bar.update(rows)
        if n_done != len(layout.origin):
            raise ValueError(f"{n_done:,} rows of {shard.file} came, {len(layout.origin):,} were planned")
        tensors["sequence"] = (layout.origin // context).int()
        tensors["position"] = (layout.origin % context).int()
        return self._without_bad_rows(shard, tensors)

    def _encoded(self, groups: Iterable[Mapping[str, Tensor]], layout: Layout) -> Iterator[dict[str, Tensor]]:
        begin = 0
        for group in groups:
            end = begin + len(group[next(iter(self.d_model))])
            mask = None if layout.cached is None else layout.cached[begin:end].flatten()
            begin = end
            found: dict[str, Tensor] = {}
            for name in self.d_model:
                rows = group[name].flatten(0, 1)
                found |= self.encoding.encode(name, rows if mask is None else rows[mask.to(rows.device)])
            yield found

    def write(self, shard: PlannedShard, filled: Filled) -> dict[str, Any]:
        """Writes a shard, then its record, which it returns.

        Raises:
            InputError: if the disk is full.
        """
        tensors = filled.tensors
        rows = len(tensors["sequence"])
        if not self.knows_sequences:
            tensors = {name: t for name, t in tensors.items() if name not in ("sequence", "position")}
        with explaining_a_full_disk(self.place, self.bytes_to_come):
            entry = write_tensors(self.place, shard.file, tensors)
            record = {"split": shard.split, "rows": rows, **entry, "skipped": filled.skipped}
            write_record(self.place, record)
        return record

    def read_back(self, record: Mapping[str, Any]) -> dict[str, Tensor]:
        """The tensors of a shard that was written before.

        Raises:
            InputError: if it is damaged.
        """
        shard = Shard(record, self.place, self.encoding)
        return shard.tensors()

    def bytes_to_come(self) -> int:
        """Bytes of all shards that are not there yet."""
        sizes = self.place.sizes()
        each = row_bytes(self.d_model, self.encoding)
        return sum(self.plan.n_rows(s) * each for s in self.plan.shards if s.file not in sizes)

    def moments(self, tensors: Mapping[str, Tensor]) -> dict[str, StreamingMoments]:
        """Sums over the rows of a shard, as they will be read, in the order on disk."""
        n = len(next(iter(tensors.values())))
        slices = [slice(begin, begin + _CHUNK) for begin in range(0, n, _CHUNK)]
        return {
            name: moments_of_rows((self.encoding.decode(name, tensors, s) for s in slices), self.device)
            for name in self.d_model
        }

    def _without_bad_rows(self, shard: PlannedShard, tensors: dict[str, Tensor]) -> Filled:
        finite = {name: self.encoding.finite(name, tensors) for name in self.d_model}
        good = torch.stack(list(finite.values())).all(0)
        if good.all():
            return Filled(tensors, [])
        origin = tensors["sequence"].long() * self.plan.context_length + tensors["position"]
        if self.non_finite == "skip":
            return Filled({name: t[good] for name, t in tensors.items()}, origin[~good].tolist())
        name = next(name for name, rows in finite.items() if not rows.all())
        row = int((~finite[name]).nonzero()[0])
        sequence, position = int(tensors["sequence"][row]), int(tensors["position"][row])
        document = ""
        if self.document_ids is not None:
            document = f", document {int(self.document_ids[sequence, position])}"
        hint = ""
        if self.encoding.dtype == torch.float16:
            hint = " `dtype`=float16 reaches only 65,504: use bfloat16;"
        raise InputError(
            f"activations at {name} are not finite: shard {shard.file}, row {row} (sequence {sequence},"
            f" position {position}{document}), {int((~good).sum())} rows of the shard in all;{hint}"
            " `non_finite`: skip leaves such rows out and counts them."
        )


def write_shards(writer: ShardWriter, shards: list[PlannedShard], ranks: Ranks, produce: Produce) -> None:
    """Writes those shards that fall to this rank, and keeps those that are there already.

    Raises:
        InputError: see `ShardWriter.write`; what was finished before stays.
    """
    place = writer.place
    mine = [shard for shard in shards if shard.index % ranks.world == ranks.rank]
    done = finished_records(place, [shard.file for shard in mine])
    statistics = RunningStatistics(place, ranks.rank, writer.d_model)
    counted = {*statistics.shards, *counted_elsewhere(place, ranks.rank)}

    def finish(shard: PlannedShard, filled: Filled) -> None:
        record = writer.write(shard, filled)
        if shard.split == "train" and shard.file not in counted:  # one that was lost may be counted already
            statistics.add(shard.file, writer.moments(filled.tensors), record["bytes"])

    total = sum(writer.plan.n_rows(shard) for shard in mine)
    bar = tqdm(total=total, desc=writer.doing, unit=" rows", unit_scale=True, position=ranks.rank)
    # Moments are products of numpy arrays, whose threads would fight with the model's.
    one_core = threadpoolctl.threadpool_limits(1, user_api="blas")
    with bar, one_core, background_threads(1, "sae-writer") as thread:
        pending: Future[None] | None = None
        for shard in mine:
            record = done.get(shard.file)
            filled = writer.fill(shard, produce, bar) if record is None else None
            if pending is not None:
                pending.result()
                pending = None
            if filled is not None:
                pending = thread.submit(finish, shard, filled)
            elif record is not None:
                bar.update(record["rows"])
                if shard.split == "train" and shard.file not in counted:  # killed before sums were saved
                    tensors = writer.read_back(record)
                    statistics.add(shard.file, writer.moments(tensors), record["bytes"])
        if pending is not None:
            pending.result()
    statistics.save()


def _behind(groups: Iterator[dict[str, Tensor]], device: torch.device) -> Iterator[dict[str, Tensor]]:
    """Brings groups to the CPU; from a GPU through pinned memory, one group behind the model."""
    if device.type != "cuda":
        yield from groups
        return
    waiting: tuple[dict[str, Tensor], torch.cuda.Event] | None = None
    for group in groups:
        pinned = {
            name: torch.empty_like(x, device="cpu", pin_memory=True).copy_(x, non_blocking=True)
            for name, x in group.items()
        }
        arrived = torch.cuda.Event()
        arrived.record()
        if waiting is not None:
            waiting[1].synchronize()
            yield waiting[0]
        waiting = (pinned, arrived)
    if waiting is not None:
        waiting[1].synchronize()
        yield waiting[0]
