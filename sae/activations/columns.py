"""Arrays of one length that grow on disk, so that memory does not bound them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np


class Columns:
    """Arrays of one length that grow on disk: raw files beside one another."""

    def __init__(self, folder: Path, name: str, masked: bool) -> None:
        self._types: dict[str, Any] = {"tokens": np.int32, "documents": np.int32}
        if masked:
            self._types["cached"] = np.bool_
        self._paths = {column: folder / f"{name}.{column}.tmp" for column in self._types}
        for path in self._paths.values():
            path.unlink(missing_ok=True)  # not cut short in place: tensors of an earlier call may map it
        self._files = {column: path.open("wb") for column, path in self._paths.items()}

    def __enter__(self) -> Columns:
        return self

    def __exit__(self, *_: object) -> None:
        """Removes the files."""
        for column, file in self._files.items():
            file.close()
            self._paths[column].unlink(missing_ok=True)

    def append(self, **arrays: np.ndarray) -> None:
        """Adds to the end of every column."""
        for column, array in arrays.items():
            self._files[column].write(array.astype(self._types[column], copy=False).tobytes())

    def mapped(self) -> dict[str, np.ndarray]:
        """The columns, to be read without holding them in memory; nothing is appended afterwards."""
        arrays: dict[str, np.ndarray] = {}
        for column, file in self._files.items():
            file.close()
            # Mapped for writing, since torch takes no arrays that are read-only; an empty file has no map.
            path, dtype = self._paths[column], self._types[column]
            mapped = np.memmap(path, dtype, "r+") if path.stat().st_size else np.empty(0, dtype)
            arrays[column] = np.asarray(mapped)
        return arrays
