"""Opening arrays in files by their kind: .npy, .safetensors, .pt, and folders of Hugging Face `datasets`."""

from __future__ import annotations

import json
import pickle
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sae.activations.exchange.array_folders import is_dataset_folder, open_column
from sae.activations.exchange.arrays import Array, FileArray, Joined, TensorArray, file_identity
from sae.errors import InputError

Given = Array | Tensor | np.ndarray | str | Path
"""An array, or the path of one."""

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def open_array(given: Given | Sequence[Given], tensor: str | None = None) -> Array:
    """The array itself, or that in a file, or several files of one kind joined in order.

    Args:
        given: tensor, numpy array (a memmap too), path, or several of them.
        tensor: name of the tensor in each file, or of the folder's column, where there are several.

    Raises:
        InputError: if there is no such file or tensor, or the file cannot be read as an array; lists the
            names that are there.
    """
    if isinstance(given, Sequence) and not isinstance(given, str):
        kinds = {Path(one).suffix for one in given if isinstance(one, str | Path)}
        if not given or len(kinds) > 1:
            found = ", ".join(sorted(kind or "folder" for kind in kinds)) or "none"
            raise InputError(f"arrays that are joined must be files of one kind, got {found}.")
        arrays = [open_array(one, tensor) for one in given]
        return arrays[0] if len(arrays) == 1 else Joined(arrays)
    if isinstance(given, Array):
        return given
    if isinstance(given, Tensor):
        return TensorArray(given)
    if isinstance(given, np.ndarray):
        return TensorArray(_tensor_of("array", given))
    return _open_file(Path(given), tensor)


def _open_file(path: Path, tensor: str | None) -> Array:
    if path.is_dir():
        if not is_dataset_folder(path):
            raise InputError(
                f"{path} is a folder, but not one of Hugging Face `datasets` (it has no dataset_info.json or"
                " state.json); give .npy, .safetensors or .pt files."
            )
        return open_column(path, tensor)
    if not path.is_file():
        raise InputError(f"there is no file {path}.")
    kinds = {".npy": _npy, ".safetensors": _safetensors, ".pt": _pt, ".pth": _pt}
    if path.suffix not in kinds:
        raise InputError(
            f"{path}: the suffix must be one of {', '.join(kinds)}, got {path.suffix!r}; save it as one of"
            " these."
        )
    return kinds[path.suffix](path, tensor)


def _npy(path: Path, tensor: str | None) -> Array:
    if tensor is not None:
        raise InputError(f"`tensor` {tensor!r}: {path} holds one array, without a name; leave it out.")
    headers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    try:
        with path.open("rb") as file:
            shape, by_columns, dtype = headers[np.lib.format.read_magic(file)](file)
            offset = file.tell()
    except (ValueError, KeyError) as error:
        raise InputError(f"{path} is not a .npy array: {error}.") from error
    if dtype.hasobject:
        raise InputError(f"{path} holds Python objects, not numbers; save a float array with np.save.")
    torch_dtype = _tensor_of(str(path), np.empty(0, dtype)).dtype
    if not shape:
        raise InputError(f"{path} holds a single number; an array of rows is needed.")
    if by_columns and len(shape) > 1:  # rows are not in one piece
        mapped = np.load(path, mmap_mode="c", allow_pickle=False)
        return TensorArray(_tensor_of(str(path), mapped), str(path), file_identity(path))
    return FileArray(path, offset, torch_dtype, shape, swapped=not dtype.isnative)


def _safetensors(path: Path, tensor: str | None) -> Array:
    try:
        with safe_open(path, framework="pt"):  # checks the header
            pass
    except SafetensorError as error:
        raise InputError(f"{path} is not a safetensors file: {error}.") from error
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    header.pop("__metadata__", None)
    name = _choose(path, header, tensor)
    about = header[name]
    if about["dtype"] not in _DTYPES:
        raise InputError(f"{path} [{name}] has the dtype {about['dtype']}; save it as F32, BF16 or F16.")
    if not about["shape"]:
        raise InputError(f"{path} [{name}] holds a single number; an array of rows is needed.")
    offset = 8 + length + about["data_offsets"][0]
    return FileArray(path, offset, _DTYPES[about["dtype"]], about["shape"], tensor=name)


def _pt(path: Path, tensor: str | None) -> Array:
    try:
        found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except pickle.UnpicklingError as error:
        raise InputError(
            f"{path} holds more than tensors, and unpickling other objects could run any code, so it is not"
            " read; save the tensor alone: torch.save(x, path)."
        ) from error
    except (RuntimeError, ValueError, EOFError, OSError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(f"{path} cannot be read ({why}); save the tensor again with torch.save.") from error
    if isinstance(found, Tensor):
        if tensor is not None:
            raise InputError(f"`tensor` {tensor!r}: {path} holds one tensor, without a name; leave it out.")
        chosen, name = found, None
    else:
        items = found.items() if isinstance(found, Mapping) else ()
        tensors = {str(key): value for key, value in items if isinstance(value, Tensor)}
        name = _choose(path, tensors, tensor)
        chosen = tensors[name]
    shown = str(path) if name is None else f"{path} [{name}]"
    if chosen.layout != torch.strided or not chosen.ndim:
        raise InputError(
            f"{shown} must be a dense tensor of rows, got {chosen.layout} {tuple(chosen.shape)}."
        )
    return TensorArray(chosen, shown, {**file_identity(path), "tensor": name})


def _choose(path: Path, found: Mapping[str, Any], tensor: str | None) -> str:
    """The tensor that is meant; a file's only one needs no name."""
    names = ", ".join(sorted(found)) or "none"
    if tensor is None and len(found) == 1:
        return next(iter(found))
    if tensor is None:
        raise InputError(f"{path} holds {len(found)} tensors: {names}; say which one with `tensor`.")
    if tensor not in found:
        raise InputError(f"`tensor` {tensor!r} is not in {path}; it has {names}.")
    return tensor


def _tensor_of(name: str, array: np.ndarray) -> Tensor:
    """Shares the memory, so far as torch can address it."""
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if any(stride < 0 for stride in array.strides):
        array = array.copy()
    try:
        with warnings.catch_warnings():  # torch knows no read-only tensors; nothing here writes
            warnings.filterwarnings("ignore", message=".*not writable")
            return torch.from_numpy(array)
    except TypeError as error:
        raise InputError(
            f"{name} has the dtype {array.dtype}, which is no number that torch knows; save it as float32"
            " or float16 (bfloat16: as .safetensors)."
        ) from error
