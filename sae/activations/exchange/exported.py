"""Rows of a cache written as .npy files, in the order of the text they come from."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from sae.activations.cache import ActivationCache, Shard
from sae.activations.cache.format import ORDER, SEQUENCES
from sae.errors import InputError
from sae.files import format_bytes

_ROWS_AT_ONCE = 8192
_NUMPY = {torch.float64: np.float64, torch.float32: np.float32, torch.float16: np.float16}


class _Piece(NamedTuple):
    """A shard's share of the files."""

    shard: Shard
    places: Int[Tensor, " rows"]
    """Row of the files that each of the shard's rows goes to."""


def export_activations(
    cache: ActivationCache,
    out: str | Path,
    *,
    hookpoint: str | None = None,
    split: Literal["train", "held_out", "all"] = "all",
) -> list[Path]:
    """Writes the rows of one hookpoint, sequence after sequence and in each by position.

    Train sequences come first, then held-out ones; mere rows come back in the order they were imported
    in. Beside `acts.npy` lie `acts.sequence.npy` and `acts.position.npy`, and `acts.tokens.npy`, int32,
    so far as the cache knows them. bfloat16 and int8 become float32: .npy has no bfloat16.

    Args:
        cache: to read.
        out: the .npy file to write.
        hookpoint: which one; None = the cache's only one.
        split: which rows.

    Returns:
        The files written.

    Raises:
        InputError: if `out` cannot be written or exists, the disk is too small, the hookpoint must be
            named, or the cache is a rolling one, of which only a part is there.
    """
    hookpoint = _settle_hookpoint(cache, hookpoint)
    if cache.is_rolling:
        raise InputError(f"the cache {cache.location} is a rolling one: only a part of its rows is there.")
    out = Path(out)
    beside = ["sequence", "position"] if _knows_sequences(cache) else []
    token_ids = _token_ids(cache)
    if beside and token_ids is not None:
        beside.append("tokens")
    files = {name: out.with_suffix(f".{name}.npy") for name in beside} | {"x": out}
    rows = {"train": cache.n_rows("train"), "held_out": cache.n_rows("held_out")}
    n = sum(rows.values()) if split == "all" else rows[split]
    dtype = _NUMPY.get(cache.encoding.row_dtype, np.float32)
    d_model = cache.d_model(hookpoint)
    _check_out(out, n * (d_model * np.dtype(dtype).itemsize + 4 * len(beside)))
    written = {
        name: np.lib.format.open_memmap(
            _temporary(file),
            mode="w+",
            dtype=dtype if name == "x" else np.int32,
            shape=(n, d_model) if name == "x" else (n,),
        )
        for name, file in files.items()
    }
    with tqdm(total=n, desc="export", unit=" rows", unit_scale=True) as bar:
        for piece in _pieces(cache, split):
            _copy(piece, hookpoint, token_ids, written, bar)
            piece.shard.close()
    for name, file in files.items():  # the rows last: where they are, the others are too
        written[name].flush()
        _temporary(file).replace(file)
    return [out, *(file for name, file in files.items() if name != "x")]


def _copy(
    piece: _Piece, hookpoint: str, token_ids: Tensor | None, written: dict[str, np.memmap], bar: tqdm
) -> None:
    """Copies a shard in the order of the files, so that what is written lies together."""
    shard = piece.shard
    for some in piece.places.argsort().split(_ROWS_AT_ONCE):
        places = piece.places[some].numpy()
        x = shard.x(hookpoint, some)
        written["x"][places] = (x.float() if x.dtype not in _NUMPY else x).numpy()
        if "sequence" in written:
            sequence, position = shard.tensor("sequence")[some], shard.tensor("position")[some]
            written["sequence"][places], written["position"][places] = sequence.numpy(), position.numpy()
            if "tokens" in written and token_ids is not None:
                written["tokens"][places] = token_ids[sequence.long(), position.long()].numpy()
        bar.update(len(some))


def _pieces(cache: ActivationCache, split: str) -> Iterator[_Piece]:
    """Shard by shard, where its rows go."""
    begin = 0
    if split != "held_out":
        yield from _train_pieces(cache)
        begin = cache.n_rows("train")
    if split != "train":
        for shard in cache.shards("held_out"):  # in order as they are
            yield _Piece(shard, torch.arange(begin, begin + shard.rows))
            begin += shard.rows


def _train_pieces(cache: ActivationCache) -> Iterator[_Piece]:
    """A shard holds whole contexts; so it takes only a count of each context's rows to place them."""
    context = cache.rows_per_context if not _knows_sequences(cache) else cache.manifest["context_length"]
    shards = cache.shards("train")
    with safe_open(cache.place.local(ORDER), framework="pt") as file:
        origin = file.get_tensor("order").split([shard.rows for shard in shards])
    last = max((int(part.max()) for part in origin if len(part)), default=0)
    counts = torch.zeros(last // context + 1, dtype=torch.int64)
    for part in origin:
        found, n = (part // context).unique(return_counts=True)
        counts[found] += n
    begins = counts.cumsum(0) - counts
    for shard, part in zip(shards, origin, strict=True):
        if not len(part):
            continue
        in_order = part.argsort()
        sequence = part[in_order] // context
        first = torch.ones(len(part), dtype=torch.bool)
        first[1:] = sequence[1:] != sequence[:-1]
        at = torch.arange(len(part))
        since_first = at - torch.where(first, at, 0).cummax(0).values
        places = torch.empty_like(part)
        places[in_order] = begins[sequence] + since_first
        yield _Piece(shard, places)


def _settle_hookpoint(cache: ActivationCache, hookpoint: str | None) -> str:
    if hookpoint is None and len(cache.hookpoints) > 1:
        raise InputError(
            f"`hookpoint` must be given: the cache {cache.location} has {', '.join(cache.hookpoints)}."
        )
    return cache.check_hookpoint(hookpoint or cache.hookpoints[0])


def _knows_sequences(cache: ActivationCache) -> bool:
    return cache.shards("held_out")[0].has("sequence")


def _token_ids(cache: ActivationCache) -> Tensor | None:
    names = [entry["file"] for entry in cache.manifest["files"]]
    return cache.sequences("token_ids") if SEQUENCES in names else None


def _temporary(file: Path) -> Path:
    return file.with_name(f"{file.name}.tmp")


def _check_out(out: Path, n_bytes: int) -> None:
    """Raises `InputError` unless the file can be written, and would replace nothing."""
    if out.suffix != ".npy":
        raise InputError(f"`out` must be a .npy file, got {out}.")
    if not out.parent.is_dir():
        raise InputError(f"`out`: there is no folder {out.parent}; make it first.")
    for file in (out, *(out.with_suffix(f".{name}.npy") for name in ("sequence", "position", "tokens"))):
        if file.exists():
            raise InputError(f"`out`: {file} exists; name another file, or delete it.")
    free = shutil.disk_usage(out.parent).free
    if n_bytes > free:
        raise InputError(
            f"`out` takes {format_bytes(n_bytes)} in {out.parent}, {format_bytes(n_bytes - free)} more than"
            " is free; export one `split`, or name another folder."
        )
