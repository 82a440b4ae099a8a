"""Arrays that need not fit into memory, read some rows at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from sae.errors import InputError

_HASHED_AT_ONCE = 64 * 2**20  # bytes


class Array(ABC):
    """An array of which stretches along the first axis can be read."""

    name: str
    """For messages: the file, and the tensor in it where it holds several."""
    shape: tuple[int, ...]
    dtype: torch.dtype

    @abstractmethod
    def read(self, begin: int, end: int) -> Tensor:
        """Elements begin to end of the first axis, in the array's own dtype."""

    @abstractmethod
    def identity(self) -> Any:
        """What tells it from other arrays, as JSON: of a file its name, length and time of change."""

    def __len__(self) -> int:
        return self.shape[0]


class FileArray(Array):
    """Numbers that lie in a file one after another.

    They are read, not mapped: mapped pages count as this process's memory until the system wants them.
    """

    def __init__(
        self,
        path: Path,
        offset: int,
        dtype: torch.dtype,
        shape: Sequence[int],
        *,
        tensor: str | None = None,
        swapped: bool = False,
    ) -> None:
        """Describes the file.

        Args:
            path: the file.
            offset: bytes before the first number.
            dtype: of the numbers.
            shape: of the array, last axis fastest.
            tensor: its name in the file, where that holds several.
            swapped: the bytes of a number are in the other order than this machine's.

        Raises:
            InputError: if the file is shorter than that.
        """
        self.name = str(path) if tensor is None else f"{path} [{tensor}]"
        self.shape, self.dtype = tuple(shape), dtype
        self._path, self._offset, self._swapped, self._tensor = path, offset, swapped, tensor
        self._each = dtype.itemsize * int(np.prod(self.shape[1:], dtype=np.int64))
        whole, found = offset + self._each * self.shape[0], path.stat().st_size
        if found < whole:
            raise InputError(f"{path} is cut short: it has {found:,} of {whole:,} bytes; copy it again.")

    def read(self, begin: int, end: int) -> Tensor:
        """One read of the file."""
        data = np.fromfile(
            self._path, np.uint8, (end - begin) * self._each, offset=self._offset + begin * self._each
        )
        if self._swapped:
            data = np.ascontiguousarray(data.reshape(-1, self.dtype.itemsize)[:, ::-1]).reshape(-1)
        return torch.from_numpy(data).view(self.dtype).reshape(end - begin, *self.shape[1:])

    def identity(self) -> Any:
        """Of the file, and the tensor's name."""
        return {**file_identity(self._path), "tensor": self._tensor}


class TensorArray(Array):
    """A tensor in memory, or one that is a mapped file."""

    def __init__(self, tensor: Tensor, name: str = "array", identity: Any = None) -> None:
        """Takes the tensor as it is.

        Args:
            tensor: with at least one axis.
            name: for messages.
            identity: of the file that it comes from; None = a hash of all its bytes.
        """
        self.name, self.shape, self.dtype = name, tuple(tensor.shape), tensor.dtype
        self._tensor, self._identity = tensor.detach(), identity

    def read(self, begin: int, end: int) -> Tensor:
        """A view."""
        return self._tensor[begin:end]

    def identity(self) -> Any:
        """As given, or a hash of contents, which takes one pass over them."""
        if self._identity is None:
            self._identity = {"array": self._hash(), "shape": list(self.shape), "dtype": str(self.dtype)}
        return self._identity

    def _hash(self) -> str:
        digest = xxhash.xxh3_128()
        each = max(1, self._tensor[:1].nbytes)
        for part in self._tensor.split(max(1, _HASHED_AT_ONCE // each)):
            digest.update(part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


class Joined(Array):
    """Several arrays, one after another along the first axis."""

    def __init__(self, arrays: Sequence[Array]) -> None:
        """Joins them.

        Raises:
            InputError: if they differ in dtype, or in more than their length.
        """
        first = arrays[0]
        for other in arrays[1:]:
            if (other.shape[1:], other.dtype) != (first.shape[1:], first.dtype):
                raise InputError(
                    f"{other.name} is {describe(other)}, {first.name} is {describe(first)}; arrays that are"
                    " joined may differ in their first axis only."
                )
        self._arrays = arrays
        self._ends = np.cumsum([len(array) for array in arrays])
        self.name = first.name if len(arrays) == 1 else f"{first.name} and {len(arrays) - 1} more"
        self.shape, self.dtype = (int(self._ends[-1]), *first.shape[1:]), first.dtype

    def read(self, begin: int, end: int) -> Tensor:
        """From as many of them as it takes."""
        parts = []
        at = int(np.searchsorted(self._ends, begin, side="right"))
        while begin < end:
            start, stop = int(self._ends[at]) - len(self._arrays[at]), int(self._ends[at])
            last = min(end, stop)
            parts.append(self._arrays[at].read(begin - start, last - start))
            begin, at = last, at + 1
        if not parts:
            return self._arrays[0].read(0, 0)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def identity(self) -> Any:
        """Of each."""
        return [array.identity() for array in self._arrays]


def describe(array: Array) -> str:
    """E.g. `float32 (1000, 64)`."""
    return f"{str(array.dtype).removeprefix('torch.')} {array.shape}"


def file_identity(path: Path) -> dict[str, Any]:
    """Name, length and time of change; not the folder, which may be mounted elsewhere next time."""
    status = path.stat()
    return {"file": path.name, "bytes": status.st_size, "changed_ns": status.st_mtime_ns}
