"""Rows from elsewhere, written as an activation cache."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from sae.activations.cache import FORMAT, ActivationCache, read_manifest
from sae.activations.cache.encoding import Encoding, row_bytes
from sae.activations.cache.finish import finish_cache
from sae.activations.cache.format import SEQUENCES, has_manifest, write_manifest
from sae.activations.cache.places import Place, explaining_a_full_disk, place_at
from sae.activations.cache.plan import Plan, contexts_per_shard
from sae.activations.cache.records import finished_records, restore_records
from sae.activations.cache.statistics import remove_partial
from sae.activations.cache.tensor_file import Pieces, checksum, write_tensors
from sae.activations.cache.writer import ShardWriter, write_shards
from sae.activations.exchange.array_files import Given, open_array
from sae.activations.exchange.model import check_model
from sae.activations.exchange.reading import RowsToImport, describe_import
from sae.activations.ranks import ALONE
from sae.errors import InputError
from sae.files import format_bytes

RUN = 128
"""Consecutive rows that are read together where nothing is known of sequences."""
_SEQUENCES_AT_ONCE = 1024


def import_activations(
    activations: Given | Sequence[Given] | Mapping[str, Given | Sequence[Given]],
    location: str | Path | Place,
    *,
    hookpoint: str = "acts",
    token_ids: Given | Sequence[Given] | None = None,
    lengths: Given | Sequence[Given] | None = None,
    context_length: int = RUN,
    held_out: float = 0.05,
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = "auto",
    non_finite: Literal["error", "skip"] = "error",
    model: str | None = None,
    device: str = "cpu",
) -> ActivationCache:
    """Makes a cache of activations that were computed elsewhere, or continues one that was interrupted.

    They are (rows, d_model), or (sequences, context, d_model). Arrays in files are read piece by piece
    and may be larger than memory. Train contexts are dealt to shards at random and their rows spread, as
    in a harvest; the last share is held out. Rows without tokens or lengths have no sequence and no
    position in the cache: runs of 128 of them take the place of contexts.

    Args:
        activations: a tensor, an array, a path (.npy, .safetensors, .pt, folder of `datasets`) or several
            of these to be joined; or such by hookpoint.
        location: folder or URL of the cache.
        hookpoint: name of the activations where they are not given by name.
        token_ids: integers, one for each row: (rows,) or (sequences, context).
        lengths: of the sequences that follow each other in `activations` (rows, d_model), in rows.
        context_length: length of the sequences where there are token ids and no lengths.
        held_out: share of the sequences (without any: of the rows) held out for evaluation.
        dtype: how rows are stored; auto keeps that of the activations (float64 becomes float32).
        non_finite: what to do with NaN or infinite rows: raise, or leave them out and count them.
        model: language model that the activations come from, so that latents can be read.
        device: where moments are computed.

    Raises:
        InputError: for anything wrong with the arrays, a folder that holds something else, too little
            disk, or rows that are not finite.
    """
    named = activations if isinstance(activations, Mapping) else {hookpoint: activations}
    what = describe_import(
        {name: open_array(given) for name, given in named.items()},
        token_ids=None if token_ids is None else open_array(token_ids),
        lengths=None if lengths is None else open_array(lengths),
        context_length=context_length,
        held_out=held_out,
        dtype=dtype,
        non_finite=non_finite,
        model=model,
    )
    place = place_at(location)
    with explaining_a_full_disk(place):
        manifest = _begin(place, what, model)
        if not manifest["finished"]:
            _write(place, what, manifest, torch.device(device))
    return ActivationCache(place)


def import_rows(
    x: Float[Tensor, "rows d_model"], folder: str | Path, *, hookpoint: str = "acts", held_out: float = 0.05
) -> ActivationCache:
    """Writes rows of which nothing else is known as a cache; the last ones are held out.

    Raises:
        InputError: see `import_activations`.
    """
    return import_activations(x, folder, hookpoint=hookpoint, held_out=held_out)


def _write(place: Place, what: RowsToImport, manifest: Mapping[str, Any], device: torch.device) -> None:
    """Writes the shards that are not there yet, and finishes the cache."""
    spans = what.spans
    plan = Plan(
        spans.n_train,
        len(spans.lengths) - spans.n_train,
        spans.context_length,
        manifest["contexts_per_shard"],
        spans.cached(),
    )
    writer = ShardWriter(
        place,
        plan,
        Encoding.of_manifest(manifest),
        manifest["d_model"],
        non_finite=what.options["non_finite"],
        device=device,
        doing="import",
        knows_sequences=spans.are_sequences,
    )
    _check_disk(writer, what)
    write_shards(writer, plan.shards, ALONE, what.producing(writer.encoding))
    finish_cache(place, manifest, plan, finished_records(place, [shard.file for shard in plan.shards]))


def _begin(place: Place, what: RowsToImport, model: str | None) -> dict[str, Any]:
    """The manifest of this import: that of an earlier run of it, or a new one.

    Raises:
        InputError: if the place holds something else.
    """
    identity = what.identity()
    source_hash = checksum(json.dumps(identity, sort_keys=True).encode())
    if has_manifest(place):
        manifest = read_manifest(place)
        if manifest.get("source_hash") != source_hash:
            raise InputError(
                f"`cache` {place} holds {_difference(manifest, identity)}; name another folder, or delete"
                " this one."
            )
        manifest = _go_on(place, manifest)
    elif place.sizes():
        raise InputError(f"`cache` {place} is not empty and holds no activation cache; name another folder.")
    else:
        manifest = _new_manifest(what, model, identity) | {
            "source_hash": source_hash,
            "fingerprint": source_hash,
        }
        write_manifest(place, manifest)
    if what.token_ids is not None and not manifest["files"]:
        entry = write_tensors(place, SEQUENCES, _sequences(what))
        manifest |= {"tokens_hash": entry["checksum"], "files": [entry]}
        write_manifest(place, manifest)
    return manifest


def _difference(manifest: Mapping[str, Any], identity: Mapping[str, Any]) -> str:
    earlier = manifest.get("imported")
    if earlier is None:
        return "a cache that was not imported"
    keys = [key for key in identity if earlier.get(key) != identity[key]]
    return f"another import (it differs in {', '.join(keys)})"


def _go_on(place: Place, manifest: dict[str, Any]) -> dict[str, Any]:
    """Of a finished cache that has lost files, what is left counts as done."""
    sizes = place.sizes()
    entries = [*manifest["files"], *manifest["shards"]]
    if manifest["finished"] and all(sizes.get(entry["file"]) == entry["bytes"] for entry in entries):
        return manifest
    if manifest["finished"]:
        restore_records(place, manifest["shards"])
        remove_partial(place)
    files = [
        entry
        for entry in manifest["files"]
        if entry["file"] == SEQUENCES and sizes.get(SEQUENCES) == entry["bytes"]
    ]
    manifest = {**manifest, "files": files, "shards": [], "finished": False}
    write_manifest(place, manifest)
    return manifest


def _new_manifest(what: RowsToImport, model: str | None, identity: Mapping[str, Any]) -> dict[str, Any]:
    spans = what.spans
    of_model: dict[str, Any] = {"model": None} if model is None else check_model(model, what)
    encoding = what.encoding()
    n = len(spans.lengths)
    rows = -(-int(spans.lengths.sum()) // n)
    counts = {"train": spans.n_train, "held_out": n - spans.n_train}
    return {
        "format": FORMAT,
        "finished": False,
        "source": None,
        "imported_from": [array.name for array in what.arrays.values()],
        "imported": identity,
        **of_model,
        "hookpoints": list(what.arrays),
        "d_model": what.d_model,
        **encoding.describe(),
        "context_length": spans.context_length if spans.are_sequences else None,
        "rows_per_context": spans.context_length,
        "contexts_per_shard": contexts_per_shard(n, rows, row_bytes(what.d_model, encoding)),
        "splits": {
            split: {"sequences": count} if spans.are_sequences else {} for split, count in counts.items()
        },
        "files": [],
        "shards": [],
    }


def _sequences(what: RowsToImport) -> dict[str, Tensor | Pieces]:
    """The contents of sequences.safetensors, shorter sequences padded with token 0."""
    spans, token_ids = what.spans, what.token_ids
    assert token_ids is not None
    shape = (len(spans.lengths), spans.context_length)
    chunks = torch.arange(shape[0]).split(_SEQUENCES_AT_ONCE)

    def padded() -> Iterator[Tensor]:
        for some in chunks:
            yield torch.stack([what.tokens_of(sequence) for sequence in some.tolist()])

    tensors: dict[str, Tensor | Pieces] = {
        "token_ids": Pieces(torch.int32, shape, padded()),
        "document_ids": Pieces(
            torch.int32, shape, (some.int()[:, None].expand(-1, shape[1]) for some in chunks)
        ),
    }
    cached = spans.cached()
    return tensors if cached is None else {**tensors, "cached": cached}


def _check_disk(writer: ShardWriter, what: RowsToImport) -> None:
    """Prints what the cache takes.

    Raises:
        InputError: if what is still to come does not fit.
    """
    rows = int(what.spans.lengths.sum())
    to_come = writer.bytes_to_come() + 8 * rows  # 8: the order file
    free = writer.place.free_bytes()
    each = row_bytes(writer.d_model, writer.encoding)
    print(
        f"cache {writer.place}: {rows:,} rows of {', '.join(writer.d_model)} as"
        f" {writer.encoding.describe()['dtype']}, {each:,} bytes a row, {format_bytes(to_come)} to come,"
        f" {'no limit' if free is None else format_bytes(free)} free",
        flush=True,
    )
    if free is not None and to_come > free:
        raise InputError(
            f"the import needs {format_bytes(to_come)} more in {writer.place},"
            f" {format_bytes(to_come - free)} more than is free; choose a smaller `dtype` (int8), or name"
            " another `cache` folder."
        )
