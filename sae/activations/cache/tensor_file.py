"""Safetensors files written piece by piece, so that no file need ever be in memory as a whole."""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor

from sae.activations.cache.places import Place
from sae.errors import InputError

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_AT_ONCE = 8 * 2**20  # bytes hashed and written together


class Pieces(NamedTuple):
    """A tensor that comes in pieces along its first axis."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    pieces: Iterable[Tensor]


def write_tensors(
    place: Place,
    name: str,
    tensors: Mapping[str, Tensor | Pieces],
    metadata: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """Writes a safetensors file, whole or not at all.

    The largest items come first, so that every tensor is aligned when the file is mapped into memory.

    Returns:
        Its manifest entry: file, bytes, checksum.

    Raises:
        ValueError: if pieces do not add up to the shape that was announced.
        OSError: if it cannot be written, as on a full disk.
    """
    whole = {
        key: t if isinstance(t, Pieces) else Pieces(t.dtype, tuple(t.shape), (t,))
        for key, t in tensors.items()
    }
    ordered = sorted(whole.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for key, (dtype, shape, _) in ordered:
        begin, end = end, end + dtype.itemsize * int(torch.Size(shape).numel())
        header[key] = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = xxhash.xxh3_128()
    written = 0

    def chunks() -> Iterator[bytes | memoryview]:
        nonlocal written
        for chunk in (struct.pack("<Q", len(text)) + text, *_bytes(ordered)):
            digest.update(chunk)
            written += len(chunk)
            yield chunk

    def checked() -> Iterator[bytes | memoryview]:
        yield from chunks()
        if written != 8 + len(text) + end:
            raise ValueError(f"{name}: {written:,} bytes came, {8 + len(text) + end:,} were announced")

    place.write(name, checked())
    return {"file": name, "bytes": written, "checksum": f"xxh3:{digest.hexdigest()}"}


def _bytes(ordered: Iterable[tuple[str, Pieces]]) -> Iterator[memoryview]:
    for _, (dtype, _, pieces) in ordered:
        for piece in pieces:
            if piece.dtype != dtype:
                raise ValueError(f"a piece is {piece.dtype}, {dtype} was announced")
            flat = piece.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            data = memoryview(flat.numpy())  # pyright: ignore[reportArgumentType]
            for begin in range(0, len(data), _AT_ONCE):
                yield data[begin : begin + _AT_ONCE]


def checksum(data: bytes) -> str:
    """Checksum of bytes in memory, as `write_tensors` computes it."""
    return f"xxh3:{xxhash.xxh3_128_hexdigest(data)}"


def checked_path(place: Place, entry: Mapping[str, Any]) -> Path:
    """A path of this machine where a file lies as it was written; a stale or damaged copy is fetched anew.

    Raises:
        InputError: if it is not what was written at its place either.
    """
    path = place.local(entry["file"])
    try:
        check_file(path, entry)
    except InputError:
        if not place.refetch(entry["file"]):
            raise
        check_file(path, entry)
    return path


def check_file(path: Path, entry: Mapping[str, Any]) -> None:
    """Reads a file once and compares it with its manifest entry.

    xxh3 goes at the speed of memory; it finds accidents, not forgeries. Caches of earlier versions have
    SHA-256.

    Raises:
        InputError: if it is missing, or its bytes are not those that were written.
    """
    kind, _, expected = entry["checksum"].partition(":")
    digest = {"xxh3": xxhash.xxh3_128, "sha256": hashlib.sha256}[kind]()
    buffer = bytearray(4 * 2**20)
    view = memoryview(buffer)
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                digest.update(view[:count])
    except FileNotFoundError as error:
        raise InputError(
            f"{path} is missing; run the command that made the cache again: it makes what is missing."
        ) from error
    if digest.hexdigest() != expected:
        raise InputError(
            f"{path} is damaged: its checksum is not that of what was written. Delete this file and run the"
            " command that made the cache again: it makes what is missing."
        )
