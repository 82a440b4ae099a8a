"""Arrays in folders of Hugging Face `datasets`, such as the activations that SAELens caches."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sae.activations.exchange.arrays import Array, file_identity
from sae.errors import InputError

TOKENS = "token_ids"
"""The column in which SAELens keeps the tokens of each sequence."""
_RESIDUAL = re.compile(r"blocks\.(\d+)\.hook_resid_(pre|post)")


def is_dataset_folder(path: Path) -> bool:
    """Whether `datasets` has saved something there."""
    return any((path / name).is_file() for name in ("dataset_info.json", "state.json", "dataset_dict.json"))


def hookpoint_of_column(column: str) -> str:
    """Our name for a hook of TransformerLens; other names stay.

    >>> [hookpoint_of_column(f"blocks.{name}") for name in ("0.hook_resid_pre", "3.hook_resid_post")]
    ['resid.0', 'resid.4']
    >>> hookpoint_of_column("blocks.3.hook_mlp_out")
    'blocks.3.hook_mlp_out'
    """
    match = _RESIDUAL.fullmatch(column)
    return f"resid.{int(match[1]) + (match[2] == 'post')}" if match else column


def open_column(path: Path, column: str | None) -> ColumnArray:
    """A column of arrays of one shape; None = the folder's only one of floats.

    Raises:
        InputError: if the folder cannot be read, or has no such column; lists those that it has.
    """
    dataset = _load(path)
    shapes = {name: _shape(feature) for name, feature in dataset.features.items()}
    usable = {name: found for name, found in shapes.items() if found is not None}
    floats = [name for name, (_, dtype) in usable.items() if dtype.is_floating_point]
    listed = ", ".join(f"{name} ({feature})" for name, feature in dataset.features.items()) or "none"
    if column is None and len(floats) != 1:
        raise InputError(
            f"{path} has {len(floats)} columns of float arrays of one shape; its columns: {listed}."
            " Say which one with `tensor`."
        )
    chosen: str = floats[0] if column is None else column
    if chosen not in usable:
        raise InputError(
            f"`tensor` {chosen!r} is not a column of arrays of one shape in {path}; its columns: {listed}."
        )
    shape, dtype = usable[chosen]
    return ColumnArray(path, dataset, chosen, shape, dtype)


def has_tokens(path: Path) -> bool:
    """Whether the folder has the tokens of its sequences, in the column of SAELens."""
    found = _shape(_load(path).features.get(TOKENS))
    return found is not None and not found[1].is_floating_point


class ColumnArray(Array):
    """A column of an Arrow table, mapped; a row of the table is an element of the first axis."""

    def __init__(
        self, path: Path, dataset: Any, column: str, shape: tuple[int, ...], dtype: torch.dtype
    ) -> None:
        self.name, self.column = f"{path} [{column}]", column
        self._path, self._table = path, dataset.select_columns([column]).with_format("arrow")
        self.shape, self.dtype = (len(dataset), *shape), dtype

    def read(self, begin: int, end: int) -> Tensor:
        """Some rows of the table, without going through Python lists.

        Raises:
            InputError: if one has another shape than the folder says, or holds nulls.
        """
        import pyarrow as pa

        parts = []
        for part in self._table[begin:end].column(0).chunks:
            if isinstance(part, pa.ExtensionArray):
                part = part.storage
            while pa.types.is_nested(part.type):
                part = part.flatten()
            parts.append(part.to_numpy(zero_copy_only=False))
        flat = np.concatenate(parts) if parts else np.empty(0)
        shape = (end - begin, *self.shape[1:])
        if flat.size != np.prod(shape, dtype=np.int64):
            raise InputError(
                f"{self.name}: rows {begin:,} to {end - 1:,} are not all of the shape {self.shape[1:]}; only"
                " sequences of one length can be imported from such a folder."
            )
        return torch.from_numpy(flat).to(self.dtype).reshape(shape)

    def identity(self) -> Any:
        """Of the folder's files, and the column's name."""
        files = sorted(self._path.glob("*.arrow"))
        return {"files": [file_identity(file) for file in files], "tensor": self.column}


def _load(path: Path) -> Any:
    import datasets

    if (path / "dataset_dict.json").is_file():
        raise InputError(f"{path} holds several splits; name the folder of one of them.")
    try:
        return datasets.load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} is not a whole folder of Hugging Face `datasets`: {why}.") from error


def _shape(feature: Any) -> tuple[tuple[int, ...], torch.dtype] | None:
    """Shape and dtype of each element of a column; None where it is no array of one shape."""
    import datasets

    if isinstance(feature, datasets.Array2D):
        shape, name = tuple(feature.shape), feature.dtype
    elif getattr(feature, "length", -1) > 0 and isinstance(feature.feature, datasets.Value):
        shape, name = (feature.length,), feature.feature.dtype
    else:
        return None
    dtype = getattr(torch, {"float": "float32", "double": "float64"}.get(name, name), None)
    if None in shape or not isinstance(dtype, torch.dtype):
        return None
    return shape, dtype
