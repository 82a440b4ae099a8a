"""Shards at hand when they are read: checked, fetched or harvested ahead, removed when room is needed."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable

from sae.activations.cache.places import RemotePlace
from sae.activations.cache.shard import Shard
from sae.activations.ranks import ALONE, Ranks
from sae.errors import InputError
from sae.files import format_bytes

AHEAD = 1
"""Windows made ready beyond the one being read."""
_POLL = 0.02
_STEPS_APART = 2  # ranks that train together are never further apart


class Bounded(ABC):
    """A folder of this machine that holds no more than some bytes of shards.

    Several processes may share it: each brings its share of a window, any may remove what none needs.
    """

    limit: int
    """Bytes of all shards of the split in it, at most."""
    ranks: Ranks
    """This process among those that share the folder."""

    @abstractmethod
    def is_there(self, shard: Shard) -> bool:
        """Whether the shard's file is in the folder."""

    @abstractmethod
    def bring(self, shard: Shard) -> None:
        """Puts the file there, whole; one that is there already stays."""

    @abstractmethod
    def remove(self, shard: Shard) -> None:
        """Removes the file."""

    def close(self) -> None:  # noqa: B027 - most hold nothing
        """Lets go of what is held for bringing shards."""


class Fetched(Bounded):
    """Shards of a cache behind a URL, fetched when needed."""

    def __init__(self, place: RemotePlace, limit: int, ranks: Ranks = ALONE) -> None:
        self._place, self.limit, self.ranks = place, limit, ranks

    def is_there(self, shard: Shard) -> bool:
        """As long as it should be."""
        path = self._place.fetched / shard.file
        return path.is_file() and path.stat().st_size == shard.n_bytes

    def bring(self, shard: Shard) -> None:
        """One download."""
        if not self.is_there(shard):
            self._place.fetch(shard.file)

    def remove(self, shard: Shard) -> None:
        """The copy only."""
        (self._place.fetched / shard.file).unlink(missing_ok=True)


class ShardSupply:
    """Makes the shards of the present window and of the next ready, in a thread of its own.

    Ready means: the file is on this machine and its checksum has been compared. Windows come in an order
    that is known ahead, so what is needed last is removed first.
    """

    def __init__(
        self,
        shards: list[Shard],
        shards_of: Callable[[int], list[int]],
        window_of: Callable[[int], int],
        most_windows: Callable[[int], int],
        bounded: Bounded | None = None,
    ) -> None:
        """Starts with nothing ready.

        Args:
            shards: all of the split.
            shards_of: the shards of a window.
            window_of: the window of a step's first row.
            most_windows: how many windows some steps can read from, at most.
            bounded: where files come and go; None = all are there for good.

        Raises:
            InputError: if the bound does not hold the windows that are read at once.
        """
        self._shards, self._shards_of, self._window_of = shards, shards_of, window_of
        self._bounded = bounded
        self._ready: set[int] = set()
        self._oldest = self._newest = -1
        self._change = threading.Condition()
        self._error: BaseException | None = None
        self._thread: threading.Thread | None = None
        self._closed = False
        if bounded is not None:
            self._room = bounded.limit - (bounded.ranks.world - 1) * max(s.n_bytes for s in shards)
            largest = sorted((s.n_bytes for s in shards), reverse=True)
            # A step waits with those that are `_STEPS_APART` behind it and the rows up to the next one.
            needed = sum(largest[: most_windows(_STEPS_APART + 4) * len(shards_of(0))])
            if needed > self._room:
                raise InputError(
                    f"`disk` must hold the shards that are read side by side and the next ones,"
                    f" {format_bytes(needed + bounded.limit - self._room)}, got"
                    f" {format_bytes(bounded.limit)}; raise it, or lower `shuffle_rows`."
                )

    def at_step(self, step: int) -> None:
        """Says which step is being trained: what lies well behind it may go."""
        with self._change:
            self._oldest = self._window_of(max(0, step - _STEPS_APART))
            self._change.notify_all()

    def wait_for(self, step: int) -> None:
        """Returns when all shards that a step may read are ready.

        Raises:
            InputError: if a shard is damaged or cannot be had.
        """
        with self._change:
            # Under the lock: the schedule keeps its last window, and several threads ask for theirs.
            first, last = self._window_of(step), self._window_of(step + 1)
            self._newest = max(self._newest, last)
            if self._oldest < 0:
                self._oldest = first
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="sae-supply", daemon=True)
                self._thread.start()
            self._change.notify_all()
            needed = {shard for window in range(first, last + 1) for shard in self._shards_of(window)}
            self._change.wait_for(
                lambda: self._error or self._closed or all(self._is_ready(shard) for shard in needed)
            )
            if self._closed:
                raise RuntimeError("the supply of shards was closed while a batch waited for it")
            if self._error is not None:
                raise self._error

    def stop(self) -> None:
        """Asks the thread to end; does not wait for it."""
        with self._change:
            self._closed = True
            self._change.notify_all()

    def close(self) -> None:
        """Ends the thread after what it is doing now."""
        self.stop()
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        try:
            while (shard := self._next()) is not None:
                self._make_ready(shard)
                with self._change:
                    self._ready.add(shard)
                    self._change.notify_all()
        except BaseException as error:  # noqa: BLE001 - it is raised where the shards are awaited
            with self._change:
                self._error = error
                self._change.notify_all()

    def _next(self) -> int | None:
        """The next shard to be made ready, once it can be; None when all is over."""
        with self._change:
            while not self._closed:
                for window in range(self._oldest, self._newest + AHEAD + 1):
                    missing = [shard for shard in self._shards_of(window) if not self._is_ready(shard)]
                    for shard in missing:
                        if self._is_there(shard):
                            return shard
                        if self._is_mine(shard) and self._has_room_for(shard, window):
                            return shard
                    if missing:
                        break  # a later window must not take the room of this one
                # What other ranks bring and remove is seen only by looking.
                self._change.wait(_POLL if self._is_shared else None)
            return None

    def _is_ready(self, shard: int) -> bool:
        """Whether it has been made ready, and no other rank has removed it since."""
        if shard in self._ready and self._is_shared and not self._is_there(shard):
            self._ready.discard(shard)
        return shard in self._ready

    @property
    def _is_shared(self) -> bool:
        return self._bounded is not None and self._bounded.ranks.world > 1

    def _is_there(self, shard: int) -> bool:
        return self._bounded is None or self._bounded.is_there(self._shards[shard])

    def _is_mine(self, shard: int) -> bool:
        ranks = self._bounded.ranks if self._bounded else ALONE
        return shard % ranks.world == ranks.rank

    def _has_room_for(self, shard: int, window: int) -> bool:
        """Makes room for a shard of a window, if what is not needed before suffices."""
        bounded = self._bounded
        assert bounded is not None
        there = [i for i in range(len(self._shards)) if self._is_there(i)]
        excess = self._bytes(set(there)) + self._shards[shard].n_bytes - self._room
        if excess <= 0:
            return True
        # What is needed only after this shard may go, also if it is the next window's: it lies there from an
        # earlier pass, and waiting for it to be used would be waiting for ever.
        before = {i for earlier in range(self._oldest, window + 1) for i in self._shards_of(earlier)}
        idle = [i for i in there if i not in before]
        idle.sort(key=lambda i: self._next_use(i, window), reverse=True)
        if self._bytes(set(idle)) < excess:
            return False
        for i in idle:
            if excess <= 0:
                break
            self._ready.discard(i)
            self._shards[i].close()
            bounded.remove(self._shards[i])
            excess -= self._shards[i].n_bytes
        return True

    def _next_use(self, shard: int, after: int) -> int:
        window = after + 1
        while shard not in self._shards_of(window):
            window += 1
        return window

    def _make_ready(self, shard: int) -> None:
        if self._bounded is not None:
            self._bounded.bring(self._shards[shard])
        self._shards[shard].check_once()

    def _bytes(self, shards: set[int]) -> int:
        return sum(self._shards[i].n_bytes for i in shards)
