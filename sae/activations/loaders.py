"""Batches of a cache: the train split shuffled and resumable, the held-out split in order."""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from sae.activations.cache import ActivationCache, RowBatch, Shard
from sae.activations.cache.supply import Bounded, ShardSupply
from sae.activations.ranks import ALONE, Ranks
from sae.activations.sampler import SHUFFLE_ROWS, RowSampler
from sae.errors import InputError
from sae.ops.threads import background_threads


class RowsOf(NamedTuple):
    """What a loader reads."""

    hookpoint: str
    d_model: int
    dtype: torch.dtype
    """That rows are read in."""


class TrainLoader:
    """Batches of the train split, endlessly; one iteration is about one pass over the rows.

    A batch depends on the seed and on the number of batches given out before it, and on nothing else, so
    saving these two resumes at the very next batch, whatever threads have gathered ahead.
    """

    def __init__(
        self,
        shards: list[Shard],
        rows: RowsOf,
        batch_size: int,
        seed: int,
        ranks: Ranks = ALONE,
        *,
        rows_per_context: int = 128,
        shuffle_rows: int = SHUFFLE_ROWS,
        workers: int = 1,
        pin_memory: bool = False,
        bounded: Bounded | None = None,
    ) -> None:
        """Prepares the stream.

        Args:
            shards: of the train split.
            rows: what is read of them.
            batch_size: rows per step over all ranks.
            seed: of the order.
            ranks: this process among those that share a batch.
            rows_per_context: of the cache, at most; see `RowSampler`.
            shuffle_rows: rows mixed together.
            workers: threads that gather batches ahead; 0 = gathered when asked for.
            pin_memory: gather into pinned memory, from where copies to a GPU are asynchronous.
            bounded: where shards come and go; None = all are there for good.

        Raises:
            InputError: if a batch cannot be shared equally or is larger than the split.
        """
        if batch_size % ranks.world:
            raise InputError(f"`batch_size`={batch_size} must be a multiple of the {ranks.world} ranks.")
        if workers < 0:
            raise InputError(f"`workers` must be at least 0, got {workers}.")
        self._shards, self._rows, self._ranks = shards, rows, ranks
        self._batch_size, self._seed, self._shuffling = batch_size, seed, (rows_per_context, shuffle_rows)
        self._workers, self._pin_memory, self._bounded = workers, pin_memory, bounded
        self._step = 0
        self.waited_s = 0.0
        """Seconds that whoever asked for batches has waited for them."""
        self._lock = threading.Lock()
        self._start()

    def _start(self) -> None:
        self._sampler = self._make_sampler()
        schedule = self._make_sampler()  # one of its own: the other one is in use by the threads
        self._supply = ShardSupply(
            self._shards, schedule.shards_of, schedule.window_of, schedule.most_windows, self._bounded
        )
        weakref.finalize(self, self._supply.stop)
        self._open: tuple[int, ...] = ()

    def _make_sampler(self) -> RowSampler:
        return RowSampler([s.rows for s in self._shards], self._batch_size, self._seed, *self._shuffling)

    def __len__(self) -> int:
        """Batches in one iteration."""
        return max(1, self._sampler.n_rows // self._sampler.batch_size)

    def __iter__(self) -> Iterator[RowBatch]:
        """From the present position to the end of the iteration it lies in."""
        end = self._step + len(self) - self._step % len(self)
        if self._workers == 0:
            while self._step < end:
                asked_at = time.perf_counter()
                batch = self._gather(self._step, self._empty())
                self.waited_s += time.perf_counter() - asked_at
                self._supply.at_step(self._step)
                self._step += 1
                yield batch
            return
        with background_threads(self._workers, "sae-loader") as threads:
            ahead: deque[Future[RowBatch]] = deque()
            asked = self._step
            try:
                while self._step < end:
                    asked_at = time.perf_counter()
                    while asked < end and len(ahead) <= self._workers:
                        ahead.append(threads.submit(self._gather, asked, self._empty()))
                        asked += 1
                    batch = ahead.popleft().result()
                    self.waited_s += time.perf_counter() - asked_at
                    self._supply.at_step(self._step)
                    self._step += 1
                    yield batch
            finally:
                for future in ahead:
                    future.cancel()

    def close(self) -> None:
        """Ends what is being done ahead."""
        self._supply.close()
        if self._bounded is not None:
            self._bounded.close()

    def state_dict(self) -> dict[str, Any]:
        """The position, and all that it means: the seed of the order, batches and rows."""
        return {"step": self._step, "seed": self._seed, **self._meaning()}

    def _meaning(self) -> dict[str, Any]:
        rows_per_context, shuffle_rows = self._shuffling
        return {
            "batch_size": self._batch_size,
            "shuffle_rows": shuffle_rows,
            "rows_per_context": rows_per_context,
            "rows": self._sampler.n_rows,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continues from a saved position, in the saved order.

        Raises:
            InputError: if a position means something else here than where it was saved.
        """
        for name, value in self._meaning().items():
            if state.get(name, value) != value:
                raise InputError(
                    f"the position was saved with {name}={state[name]:,}, here it is {value:,}: rows would"
                    " repeat or be left out; continue with the saved value."
                )
        self._step, self._seed = state["step"], state["seed"]
        self._supply.close()
        self._start()

    def _empty(self) -> Float[Tensor, "rows d_model"]:
        """Memory for a batch. Asked for in the thread that trains, whose allocator has that of earlier
        batches at hand; other threads would get fresh pages, which cost as much as filling them.
        """
        shape = (self._batch_size // self._ranks.world, self._rows.d_model)
        return torch.empty(shape, dtype=self._rows.dtype, pin_memory=self._pin_memory)

    def _gather(self, step: int, x: Tensor) -> RowBatch:
        """The batch of a step, this rank's share of it."""
        self._supply.wait_for(step)
        with self._lock:
            first = self._sampler.window_of(step)
            parts = self._sampler.batch(step, *self._ranks)
            self._keep_open(first, self._sampler.last_window)
        begin = 0
        for shard, rows in parts:
            self._shards[shard].x(self._rows.hookpoint, rows, out=x[begin : begin + len(rows)])
            begin += len(rows)
        return RowBatch(x, None, None)

    def _keep_open(self, first: int, last: int) -> None:
        """Lets go of mapped shards once the windows that they belong to are past."""
        if (first, last) != self._open:
            keep = {shard for window in (first, last) for shard in self._sampler.shards_of(window)}
            for window in self._open:
                for shard in set(self._sampler.shards_of(window)) - keep:
                    self._shards[shard].close()
            self._open = (first, last)


class HeldOutLoader:
    """All held-out rows, in sequence order; several ranks share every batch."""

    def __init__(self, cache: ActivationCache, hookpoint: str, batch_size: int, ranks: Ranks = ALONE) -> None:
        self._cache, self._hookpoint, self._batch_size, self._ranks = cache, hookpoint, batch_size, ranks

    def __len__(self) -> int:
        """Number of batches."""
        return sum(-(-shard.rows // self._batch_size) for shard in self._cache.shards("held_out"))

    def __iter__(self) -> Iterator[RowBatch]:
        """The batches, each with the origin of its rows."""
        return self._cache.batches("held_out", self._hookpoint, self._batch_size, self._ranks)
