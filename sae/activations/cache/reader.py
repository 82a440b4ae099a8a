"""A finished cache, opened for reading."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from sae.activations.cache.encoding import Encoding
from sae.activations.cache.format import AGAIN, MOMENTS, SEQUENCES, Split, read_manifest
from sae.activations.cache.places import Place, RemotePlace, place_at
from sae.activations.cache.records import finished_records
from sae.activations.cache.shard import Shard
from sae.activations.cache.tensor_file import check_file, checksum
from sae.activations.ranks import ALONE, Ranks
from sae.errors import InputError
from sae.ops.moments import Moments


class RowBatch(NamedTuple):
    """Some rows of one hookpoint, with where they come from."""

    x: Float[Tensor, "rows d_model"]
    """Activations in the cache's dtype; float32 where that is int8."""
    sequence: Int[Tensor, " rows"] | None
    """Row of `token_ids` that each came from; None in caches of imported rows."""
    position: Int[Tensor, " rows"] | None
    """Position within that context."""


class ActivationCache:
    """A finished cache, opened for reading; needs neither the language model nor the text.

    A rolling cache (`data.source.disk`) can be opened too: then its train split is what is at hand now.

    >>> ActivationCache("caches/demo").batches("train", "resid.2", 512)  # doctest: +SKIP

    Raises:
        InputError: if the folder or URL holds no finished cache of this format, or a shard is missing or
            has another size than was written.
    """

    def __init__(self, location: str | Path | Place) -> None:
        self.place = place_at(location)
        self.manifest = read_manifest(self.place)
        if isinstance(self.place, RemotePlace):  # copies of an earlier cache at this URL are none of this one
            self.place.keep_copies_of(checksum(json.dumps(self.manifest).encode()).rpartition(":")[2][:12])
        self.is_rolling = "rolling" in self.manifest
        if not self.manifest.get("finished") and not self.is_rolling:
            raise InputError(
                f"the cache {self.place} is not finished; run the command that makes it again (for a"
                " harvest scripts/cache_activations.py with its config): it continues."
            )
        sizes = self.place.sizes()
        for entry in [*self.manifest["files"], *self.manifest["shards"]]:
            self._check_size(entry, sizes.get(entry["file"]))
        self.encoding = Encoding.of_manifest(self.manifest)
        self._shards: dict[Split, list[Shard]] = {"train": [], "held_out": []}
        for entry in self.manifest["shards"]:
            self._shards[entry["split"]].append(Shard(entry, self.place, self.encoding))

    def _at_hand(self) -> list[Shard]:
        """The train shards that a rolling cache has at the moment."""
        records = finished_records(self.place, self.manifest["rolling"]["train"])
        return [Shard(record, self.place, self.encoding) for record in records.values()]

    def _check_size(self, entry: Mapping[str, Any], size: int | None) -> None:
        if size != entry["bytes"]:
            found = "is missing" if size is None else f"has {size:,} bytes instead of {entry['bytes']:,}"
            remake = "run the command that made it again: only what is missing is made"
            again = AGAIN if entry["file"] == SEQUENCES else remake
            raise InputError(f"{self.place}/{entry['file']} {found}; {again}.")

    def __repr__(self) -> str:
        rows = f"{self.n_rows('train'):,} train and {self.n_rows('held_out'):,} held-out rows"
        kind = f"{', '.join(self.hookpoints)}, {self.manifest['dtype']}"
        return f"ActivationCache({self.location!r}: {rows} of {kind})"

    @property
    def location(self) -> str:
        """Folder or URL."""
        return self.place.location

    @property
    def rows_per_context(self) -> int:
        """Rows of a context, at most: in so many stretches each context is spread over its shard."""
        return self.manifest.get("rows_per_context") or self.manifest["context_length"] or 128

    @property
    def hookpoints(self) -> list[str]:
        """Names of the hookpoints cached."""
        return list(self.manifest["hookpoints"])

    def sequences(self, name: str) -> Tensor | None:
        """A tensor of sequences.safetensors, mapped: `token_ids` or `document_ids`, or `cached`, a mask of
        the positions that have a row (None: all have). Train contexts come first, then held-out ones.

        Raises:
            InputError: if its rows were imported without tokens.
        """
        if SEQUENCES not in [entry["file"] for entry in self.manifest["files"]]:
            raise InputError(f"the cache {self.place} holds no token ids; directions cannot be read from it.")
        path = self.place.local(SEQUENCES)
        try:
            with safe_open(path, framework="pt") as file:
                return file.get_tensor(name) if name in file.keys() else None  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path} is damaged: {error}; {AGAIN}.") from error

    @property
    def token_ids(self) -> Int[Tensor, "sequences context"]:
        """The contexts, int32: train sequences first, then held-out ones."""
        found = self.sequences("token_ids")
        if found is None:
            raise InputError(f"the cache {self.place} holds no token ids; directions cannot be read from it.")
        return found

    def d_model(self, hookpoint: str) -> int:
        """Width of a hookpoint's rows."""
        return int(self.manifest["d_model"][self.check_hookpoint(hookpoint)])

    def n_rows(self, split: Split) -> int:
        """Number of rows of a split; of a rolling cache's train split those at hand."""
        return sum(shard.rows for shard in self.shards(split))

    def shards(self, split: Split) -> list[Shard]:
        """The shards of a split, in the order written; of a rolling cache's train split those at hand.

        Raises:
            InputError: if there is no such split.
        """
        if split not in self._shards:
            raise InputError(f"`split` must be 'train' or 'held_out', got {split!r}.")
        return self._at_hand() if self.is_rolling and split == "train" else self._shards[split]

    def moments(self, hookpoint: str) -> Moments:
        """Count, mean and second moments of all train rows, as they were written."""
        name = self.check_hookpoint(hookpoint)
        tensors = load_file(self.place.local(MOMENTS))
        rows = self.manifest["statistics"][name].get("rows", self.n_rows("train"))
        return Moments(rows, tensors[f"{name}.mean"], tensors[f"{name}.second"])

    def batches(
        self, split: Split, hookpoint: str, batch_size: int, ranks: Ranks = ALONE
    ) -> Iterator[RowBatch]:
        """All rows of a split once, in the order they lie on disk (held-out: sequence order).

        Several ranks each get a stretch of every batch, of equal length but for one row.
        """
        self.check_hookpoint(hookpoint)
        if batch_size < 1:
            raise InputError(f"`batch_size` must be at least 1, got {batch_size}.")
        for shard in self.shards(split):
            has_origin = shard.has("sequence")
            for begin in range(0, shard.rows, batch_size):
                end = min(begin + batch_size, shard.rows)
                cuts = [begin + (end - begin) * rank // ranks.world for rank in (ranks.rank, ranks.rank + 1)]
                rows = slice(*cuts)
                origin = [
                    shard.tensor(name)[rows] if has_origin else None for name in ("sequence", "position")
                ]
                yield RowBatch(shard.x(hookpoint, rows), *origin)
            shard.close()

    def check_hookpoint(self, hookpoint: str) -> str:
        """Returns the name; raises `InputError` if the cache lacks it."""
        if hookpoint not in self.manifest["hookpoints"]:
            raise InputError(
                f"`hookpoint` {hookpoint!r} is not in the cache {self.place}; it has"
                f" {', '.join(self.hookpoints)}."
            )
        return hookpoint

    def verify(self) -> None:
        """Reads every file once and compares checksums.

        Raises:
            InputError: naming every file whose bytes are not those that were written.
        """
        damaged: list[str] = []
        shards = [*self.shards("train"), *self.shards("held_out")]
        for entry in [*(shard.entry for shard in shards), *self.manifest["files"]]:
            try:
                check_file(self.place.local(entry["file"]), entry)
            except InputError as error:
                damaged.append(str(error))
            self.place.release(entry["file"])
        if damaged:
            raise InputError("\n".join(damaged))
