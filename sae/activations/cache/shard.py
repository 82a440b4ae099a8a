"""One shard file: mapped into memory, checked when first read, decoded row by row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sae.activations.cache.encoding import Encoding
from sae.activations.cache.format import AGAIN, MAKE_MISSING
from sae.activations.cache.places import Place
from sae.activations.cache.tensor_file import checked_path
from sae.errors import InputError

Rows = slice | Int[Tensor, " some"]


class Shard:
    """A shard file, mapped into memory; nothing is read until rows are asked for."""

    def __init__(self, entry: Mapping[str, Any], place: Place, encoding: Encoding) -> None:
        """Describes the file.

        Args:
            entry: of the manifest.
            place: of the cache.
            encoding: how its rows are stored.
        """
        self.file: str = entry["file"]
        self.rows: int = entry["rows"]
        self.n_bytes: int = entry["bytes"]
        self.entry, self._place, self._encoding = entry, place, encoding
        self._mapped: dict[str, Tensor] = {}
        self._checked: tuple[int, int] | None = None

    def tensor(self, name: str) -> Tensor:
        """A tensor of the file as it is stored, a view of the mapped file.

        Raises:
            InputError: if the file is damaged, or its rows disagree with the manifest.
        """
        mapped = self._open()
        if name not in mapped:
            raise InputError(f"shard {self.file} has no tensor {name!r}; {AGAIN}.")
        return mapped[name]

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the file, as views of it."""
        return dict(self._open())

    def has(self, name: str) -> bool:
        """Whether the file holds a tensor of that name."""
        return name in self._open()

    def x(self, hookpoint: str, rows: Rows, out: Tensor | None = None) -> Float[Tensor, "some d_model"]:
        """Some rows of a hookpoint, in the cache's dtype; float32 where that is int8.

        Args:
            hookpoint: its name.
            rows: a slice (a view, where the rows are stored as they are) or indices (a copy).
            out: filled with the rows where given.
        """
        if self._encoding.is_plain:
            stored = self.tensor(hookpoint)
            if out is None:
                return stored[rows]
            if not isinstance(rows, slice):
                return torch.index_select(stored, 0, rows, out=out)
            return out.copy_(stored[rows])
        found = self._encoding.decode(hookpoint, self._open(), rows)
        return found if out is None else out.copy_(found)

    def close(self) -> None:
        """Lets go of the mapping; the next read maps the file again."""
        if self._mapped:
            self._mapped = {}
            self._place.release(self.file)

    def describe(self, entry: Mapping[str, Any]) -> None:
        """Takes another entry: that of the file as it has been written meanwhile."""
        self.entry, self.n_bytes = entry, entry["bytes"]

    def check(self) -> None:
        """Reads the whole file and compares its checksum.

        Raises:
            InputError: naming the file, if it is not what was written.
        """
        path = checked_path(self._place, self.entry)
        status = path.stat()
        self._checked = (status.st_ino, status.st_mtime_ns)

    def check_once(self) -> None:
        """`check`, unless this process has done so since the file was written."""
        status = self._place.local(self.file).stat()
        if self._checked != (status.st_ino, status.st_mtime_ns):
            self.check()

    def _open(self) -> dict[str, Tensor]:
        """The mapped tensors; what it returns stays valid if another thread closes the shard."""
        if mapped := self._mapped:
            return mapped
        path = self._place.local(self.file)
        try:
            self.check_once()
            with safe_open(path, framework="pt") as file:
                mapped = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise InputError(f"shard {path} is damaged: {error}; {MAKE_MISSING}.") from error
        for name, tensor in mapped.items():
            if len(tensor) != self.rows:
                raise InputError(
                    f"shard {path} holds {len(tensor)} rows of {name!r}, the manifest says {self.rows};"
                    f" {AGAIN}."
                )
        self._mapped = mapped
        return mapped
