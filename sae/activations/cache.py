"""The activation cache on disk, format "sae-activation-cache/1": reading, writing, checking."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors_bytes
from torch import Tensor

from sae.errors import InputError
from sae.files import write_atomically, write_json
from sae.ops.moments import Moments

FORMAT = "sae-activation-cache/1"
Split = Literal["train", "held_out"]


class RowBatch(NamedTuple):
    """Some rows of one hookpoint, with where they come from."""

    x: Float[Tensor, "rows d_model"]
    """Activations in the cache's dtype."""
    sequence: Int[Tensor, " rows"] | None
    """Row of `token_ids` that each came from; None in caches of imported rows."""
    position: Int[Tensor, " rows"] | None
    """Position within that context."""


class Shard:
    """One shard file, mapped into memory; nothing is read until rows are asked for."""

    def __init__(self, path: Path, rows: int) -> None:
        self.path = path
        self.rows = rows
        self._mapped: dict[str, Tensor] = {}

    def tensor(self, name: str) -> Tensor:
        """A tensor of the file, as a view of the mapped file.

        Raises:
            InputError: if the file is damaged, or its rows disagree with the manifest.
        """
        if name not in self._mapped:
            try:
                with safe_open(self.path, framework="pt") as file:
                    self._mapped[name] = file.get_tensor(name)
            except (OSError, SafetensorError) as error:
                raise InputError(
                    f"shard {self.path} is damaged: {error}; harvest the cache again."
                ) from error
            if len(self._mapped[name]) != self.rows:
                raise InputError(
                    f"shard {self.path} holds {len(self._mapped[name])} rows of {name!r}, the manifest says"
                    f" {self.rows}; harvest the cache again."
                )
        return self._mapped[name]

    def has(self, name: str) -> bool:
        """Whether the file holds a tensor of that name."""
        with safe_open(self.path, framework="pt") as file:
            return name in file.keys()  # noqa: SIM118 - not a mapping


class ActivationCache:
    """A finished cache, opened for reading.

    >>> ActivationCache("caches/demo").batches("train", "resid.2", 512)  # doctest: +SKIP

    Raises:
        InputError: if the folder holds no finished cache of this format, or a shard is missing or
            has another size than was written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        if not self.manifest.get("finished"):
            raise InputError(
                f"the cache {self.folder} is not finished; run scripts/cache_activations.py with its config"
                " to continue the harvest."
            )
        for entry in self.manifest["files"]:
            self._checked(entry)
        self._shards: dict[str, list[Shard]] = {"train": [], "held_out": []}
        for entry in self.manifest["shards"]:
            self._shards[entry["split"]].append(Shard(self._checked(entry), entry["rows"]))

    def _checked(self, entry: Mapping[str, Any]) -> Path:
        """The path of a file of the manifest, if it is there and as long as it was written."""
        path = self.folder / entry["file"]
        size = path.stat().st_size if path.is_file() else None
        if size != entry["bytes"]:
            found = "is missing" if size is None else f"has {size:,} bytes"
            raise InputError(
                f"{path} {found}, the manifest says {entry['bytes']:,}; delete the folder and harvest again."
            )
        return path

    @property
    def hookpoints(self) -> list[str]:
        """Names of the hookpoints cached."""
        return list(self.manifest["hookpoints"])

    @property
    def token_ids(self) -> Int[Tensor, "sequences context"]:
        """The contexts: train sequences first, then held-out ones."""
        return load_file(self.folder / "sequences.safetensors")["token_ids"]

    def d_model(self, hookpoint: str) -> int:
        """Width of a hookpoint's rows."""
        return int(self.manifest["d_model"][self.check_hookpoint(hookpoint)])

    def n_rows(self, split: Split) -> int:
        """Number of rows of a split."""
        return sum(shard.rows for shard in self._shards[split])

    def shards(self, split: Split) -> list[Shard]:
        """The shards of a split, in the order written."""
        return self._shards[split]

    def moments(self, hookpoint: str) -> Moments:
        """Count, mean and second moments of all train rows, as they were written."""
        name = self.check_hookpoint(hookpoint)
        tensors = load_file(self.folder / "moments.safetensors")
        return Moments(self.n_rows("train"), tensors[f"{name}.mean"], tensors[f"{name}.second"])

    def batches(self, split: Split, hookpoint: str, batch_size: int) -> Iterator[RowBatch]:
        """All rows of a split once, in the order they lie on disk (held-out: sequence order)."""
        self.check_hookpoint(hookpoint)
        for shard in self._shards[split]:
            x = shard.tensor(hookpoint)
            has_origin = shard.has("sequence")
            for begin in range(0, shard.rows, batch_size):
                rows = slice(begin, begin + batch_size)
                origin = [
                    shard.tensor(name)[rows] if has_origin else None for name in ("sequence", "position")
                ]
                yield RowBatch(x[rows], *origin)

    def check_hookpoint(self, hookpoint: str) -> str:
        """Returns the name; raises `InputError` if the cache lacks it."""
        if hookpoint not in self.manifest["hookpoints"]:
            raise InputError(
                f"`hookpoint` {hookpoint!r} is not in the cache {self.folder}; it has"
                f" {', '.join(self.hookpoints)}."
            )
        return hookpoint

    def verify(self) -> None:
        """Reads every file once and compares checksums.

        Raises:
            InputError: naming the first file whose bytes are not those that were written.
        """
        for entry in [*self.manifest["shards"], *self.manifest["files"]]:
            path = self.folder / entry["file"]
            if not path.is_file() or checksum(path.read_bytes()) != entry["checksum"]:
                raise InputError(
                    f"{path} is not what was written (checksum differs); harvest the cache again."
                )


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a cache, finished or not.

    Raises:
        InputError: if there is none, or it is not of this format.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        raise InputError(f"{folder} is not an activation cache (it has no manifest.json).")
    try:
        manifest = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not JSON ({error}); delete the folder and harvest again.") from error
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found != FORMAT:
        raise InputError(f"{path} has format {found!r}, this version reads {FORMAT!r}.")
    try:
        _check_file_names(path, manifest)
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is incomplete ({error}); delete the folder and harvest again.") from error
    return manifest


def _check_file_names(path: Path, manifest: Mapping[str, Any]) -> None:
    names = [entry["file"] for entry in [*manifest["shards"], *manifest["files"]]]
    for name in names:
        if Path(name).name != name:
            raise InputError(f"{path} names the file {name!r}; all files lie in the cache's own folder.")
    if len(set(names)) != len(names):
        raise InputError(f"{path} lists a file twice; delete the folder and harvest again.")


def write_manifest(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Replaces the manifest atomically."""
    write_json(folder / "manifest.json", manifest)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """Writes a safetensors file under a temporary name, syncs it, renames it.

    Returns:
        Its manifest entry: file, bytes, checksum.
    """
    data = to_safetensors_bytes({name: tensor.contiguous() for name, tensor in tensors.items()})
    write_atomically(path, data)
    return {"file": path.name, "bytes": len(data), "checksum": checksum(data)}


def finish_cache(folder: Path, manifest: dict[str, Any], moments: Mapping[str, Moments]) -> None:
    """Writes the statistics and then, last, the manifest with `finished`: no partial cache looks whole."""
    tensors, statistics = {}, {}
    for name, of_hookpoint in moments.items():
        tensors |= {f"{name}.mean": of_hookpoint.mean, f"{name}.second": of_hookpoint.second}
        statistics[name] = {
            "mean": of_hookpoint.mean.tolist(),
            "mean_squared_norm": of_hookpoint.mean_squared_norm,
        }
    manifest["files"].append(write_tensors(folder / "moments.safetensors", tensors))
    write_manifest(folder, manifest | {"statistics": statistics, "finished": True})


def checksum(data: bytes) -> str:
    """SHA-256 of the bytes of a file, as written in the manifest."""
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def row_bytes(d_models: Mapping[str, int], dtype: torch.dtype) -> int:
    """Bytes that one row takes on disk: every hookpoint, its sequence and its position."""
    return sum(d_models.values()) * dtype.itemsize + 2 * torch.int32.itemsize
