"""The start of a harvest: the model loaded, the text packed, the shards planned, by one rank or several."""

from __future__ import annotations

import contextlib
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors import safe_open
from torch import Tensor

from sae.activations.cache import FORMAT, read_manifest
from sae.activations.cache.encoding import Encoding, row_bytes
from sae.activations.cache.format import (
    AGAIN,
    MANIFEST,
    SEQUENCES,
    has_manifest,
    is_whole,
    write_manifest,
)
from sae.activations.cache.places import Place, RemotePlace
from sae.activations.cache.plan import Plan, contexts_per_shard
from sae.activations.cache.records import restore_records
from sae.activations.cache.statistics import remove_partial
from sae.activations.cache.tensor_file import checked_path, checksum, write_tensors
from sae.activations.cache.writer import Produce, ShardWriter
from sae.activations.documents import read_documents
from sae.activations.hookpoints import check_hookpoints, reading
from sae.activations.language_model import (
    LanguageModel,
    check_model_in_reach,
    load_language_model,
    vocabulary_hash,
    weights_hash,
)
from sae.activations.packing import PackedTokens, pack
from sae.activations.probe import Probe, probe, warn_of_first_position
from sae.activations.ranks import Ranks
from sae.activations.source import Source
from sae.errors import InputError

TOKENS_AT_ONCE = {"cpu": 4096, "cuda": 16_384}
"""Tokens per forward pass, in whole contexts."""
LONGEST_WAIT = 24 * 3600.0
"""Seconds that a rank waits for the first one to tokenise the text."""
_POLL = 0.2
_OTHER_BYTES = 16  # a row, in the files of tokens, documents and order
_OURS = re.compile(r"(shard-\d+|sequences|order|moments[-\d]*|manifest)\.(safetensors|json|partial)")
_SCRATCH = "packing.tmp"


@dataclass
class Begun:
    """A harvest whose text is tokenised and whose shards are planned."""

    source: Source
    language_model: LanguageModel
    manifest: dict[str, Any]
    token_ids: Int[Tensor, "sequences context"]
    writer: ShardWriter

    def total_bytes(self) -> int:
        """Of the whole cache on disk."""
        writer = self.writer
        rows = sum(writer.plan.n_rows(shard) for shard in writer.plan.shards)
        return rows * (row_bytes(writer.d_model, writer.encoding) + _OTHER_BYTES)

    def producing(self) -> Any:
        """A context manager that gives the function from contexts to their activations."""
        return _producing(self.language_model, self.source, self.token_ids)


def begin_harvest(source: Source, place: Place, device: str, ranks: Ranks) -> Begun:
    """Loads the model, and tokenises the text unless an earlier harvest of the same source has done so.

    Raises:
        InputError: for anything wrong with the source, or too little disk.
    """
    source.check()
    check_model_in_reach(source.model)
    earlier = _earlier_manifest(source, place)
    # The text is opened before gigabytes of weights are fetched; packed text is not opened again.
    documents = read_documents(source.dataset) if earlier is None and ranks.rank == 0 else None
    language_model = load_language_model(source.model, device, source.random_weights)
    check_hookpoints(language_model.model, source.hookpoints)
    _check_context_length(language_model, source.context_length)
    identity = _identity(source, language_model)
    if ranks.rank > 0:
        manifest = wait_for_manifest(place, identity["source_hash"], lambda m: _is_begun(place, m))
    elif earlier is not None and earlier["source_hash"] == identity["source_hash"]:
        manifest = unfinished_again(place, earlier) if earlier.get("finished") else earlier
    elif earlier is not None and earlier.get("finished"):
        raise InputError(
            f"the cache {place} was made with other weights or another tokenizer of {source.model}; delete it"
            " or name another `data.cache`."
        )
    else:
        documents = documents or read_documents(source.dataset)
        manifest = _begin_anew(source, place, language_model, documents, identity)
    return _planned(source, place, language_model, manifest, torch.device(device))


def _earlier_manifest(source: Source, place: Place) -> dict[str, Any] | None:
    """The manifest of an earlier harvest of such a source, if it got as far as packed text."""
    if not has_manifest(place):
        return None
    manifest = read_manifest(place)
    if manifest.get("finished") and manifest.get("source") != source.identity():
        raise InputError(f"`cache` {place} holds the cache of another source; name another folder.")
    sizes = place.sizes()
    packed = [e for e in manifest["files"] if e["file"] == SEQUENCES and sizes.get(SEQUENCES) == e["bytes"]]
    if manifest.get("finished") and not packed:
        raise InputError(f"{place}/{SEQUENCES} is missing or damaged; {AGAIN}.")
    return manifest if packed and manifest.get("source") == source.identity() else None


def _identity(source: Source, language_model: LanguageModel) -> dict[str, Any]:
    """What tells whether shards of an earlier harvest, or of another rank, are of the same kind."""
    model_hash = weights_hash(language_model.model)
    vocabulary = vocabulary_hash(language_model.tokenizer)
    return {
        "model_hash": model_hash,
        "vocabulary_hash": vocabulary,
        "source_hash": checksum(f"{source.identity()} {model_hash} {vocabulary}".encode()),
    }


def _begin_anew(
    source: Source,
    place: Place,
    language_model: LanguageModel,
    documents: Iterable[Any],
    identity: Mapping[str, Any],
) -> dict[str, Any]:
    """Packs the text and writes the first manifest."""
    present = place.sizes()
    if present and MANIFEST not in present:
        raise InputError(f"`cache` {place} holds files but no activation cache; name a folder of its own.")
    head = {"format": FORMAT, "finished": False, "source": source.identity(), "hookpoints": source.hookpoints}
    head |= {"d_model": {}, "dtype": source.dtype, "files": [], "shards": []}
    for name in filter(_OURS.fullmatch, present):
        place.remove(name)  # of other weights: its shards must not be taken for ours
    write_manifest(place, head)  # first, so that the folder is known as ours
    scratch = _scratch(place)
    try:
        packed = _pack(source, language_model, documents, scratch)
        train = slice(packed.n_train)
        cached = None if packed.cached is None else packed.cached[train]
        shown = probe(language_model, source.hookpoints, packed.token_ids[train], cached)
        tensors = {"token_ids": packed.token_ids, "document_ids": packed.document_ids}
        if packed.cached is not None:
            tensors["cached"] = packed.cached
        _warn_of_few_held_out(packed, source.held_out)
        warn_of_first_position(shown, source.exclude_first_position)
        described = {**head, **_description(source, language_model, packed, shown), **identity}
        entry = write_tensors(place, SEQUENCES, tensors)
        manifest = {**described, "tokens_hash": entry["checksum"], "files": [entry]}
    except BaseException:
        place.remove(MANIFEST)  # what was refused must not stand in the way of a better source
        raise
    finally:
        shutil.rmtree(scratch)
    manifest["fingerprint"] = checksum(f"{identity['source_hash']} {entry['checksum']}".encode())
    write_manifest(place, manifest)
    return manifest


def _warn_of_few_held_out(packed: PackedTokens, share: float) -> None:
    """Whole documents are held out: of few long ones, it may be far fewer rows than asked for."""
    n = len(packed.token_ids)
    found = (n - packed.n_train) / n
    if found < share / 2:
        rows = (n - packed.n_train) * packed.token_ids.shape[1]
        print(
            f"warning: {rows:,} rows are held out, {found:.1%} instead of {share:.1%}: documents are held out"
            " whole, and there are few. Scores will be noisy; raise `n_tokens` or `held_out`.",
            file=sys.stderr,
        )


def _pack(
    source: Source, language_model: LanguageModel, documents: Iterable[Any], scratch: Path
) -> PackedTokens:
    return pack(
        documents,
        language_model.tokenizer,
        n_tokens=source.n_tokens,
        context_length=source.context_length,
        held_out=source.held_out,
        bos_in_every_context=source.bos_in_every_context,
        exclude_first_position=source.exclude_first_position,
        exclude_special_tokens=source.exclude_special_tokens,
        vocabulary=len(next(language_model.model.get_input_embeddings().parameters())),
        folder=scratch,
    )


def _description(
    source: Source, language_model: LanguageModel, packed: PackedTokens, shown: Probe
) -> dict[str, Any]:
    """What the manifest says of the rows to come."""
    model_dtype = language_model.model.dtype
    dtype = model_dtype if source.dtype == "auto" else getattr(torch, source.dtype)
    encoding = Encoding(dtype, shown.outliers if dtype == torch.int8 else None)
    n, context = packed.token_ids.shape
    counts = {"train": packed.n_train, "held_out": n - packed.n_train}
    per_context = context if packed.cached is None else int(packed.cached.sum(1).max())
    return {
        "model": source.model_name,
        "tokenizer": source.model,
        "dataset": source.dataset,
        "d_model": shown.d_model,
        **encoding.describe(),
        "context_length": context,
        "rows_per_context": per_context,
        "contexts_per_shard": contexts_per_shard(n, context, row_bytes(shown.d_model, encoding)),
        "first_position_length": shown.first_position,
        "splits": {split: {"sequences": count} for split, count in counts.items()},
    }


def _planned(
    source: Source,
    place: Place,
    language_model: LanguageModel,
    manifest: dict[str, Any],
    device: torch.device,
) -> Begun:

    (entry,) = [entry for entry in manifest["files"] if entry["file"] == SEQUENCES]
    with safe_open(checked_path(place, entry), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    counts = [manifest["splits"][split]["sequences"] for split in ("train", "held_out")]
    cached = tensors.get("cached")
    plan = Plan(counts[0], counts[1], source.context_length, manifest["contexts_per_shard"], cached)
    writer = ShardWriter(
        place,
        plan,
        Encoding.of_manifest(manifest),
        manifest["d_model"],
        tensors["document_ids"],
        non_finite=source.non_finite,
        device=device,
    )
    return Begun(source, language_model, manifest, tensors["token_ids"], writer)


def discard_unless_shards(place: Place) -> None:
    """Removes a harvest that was refused before it had a shard."""
    names = list(filter(_OURS.fullmatch, place.sizes()))
    if not any(name.startswith("shard") for name in names):
        for name in names:
            place.remove(name)


def unfinished_again(place: Place, manifest: dict[str, Any]) -> dict[str, Any]:
    """Of a finished cache that has lost shards, or a rolling one: those that are left count as done."""
    restore_records(place, manifest["shards"])
    remove_partial(place)  # left by a kill in the last step; the shards are counted again
    manifest = {key: value for key, value in manifest.items() if key not in ("rolling", "statistics")}
    files = [entry for entry in manifest["files"] if entry["file"] == SEQUENCES]
    manifest = {**manifest, "files": files, "shards": [], "finished": False}
    write_manifest(place, manifest)
    return manifest


def _is_begun(place: Place, manifest: Mapping[str, Any]) -> bool:
    """Whether the text is packed, and a finished manifest is not that of a cache about to be mended."""
    return bool(manifest["files"]) and (not manifest["finished"] or is_whole(place, manifest))


def wait_for_manifest(
    place: Place, source_hash: str, ready: Callable[[Mapping[str, Any]], bool]
) -> dict[str, Any]:
    """Waits until the first rank has come so far that the manifest is as wanted."""
    begin = time.monotonic()
    while time.monotonic() - begin < LONGEST_WAIT:
        if has_manifest(place):
            manifest = read_manifest(place)
            if manifest.get("source_hash") == source_hash and ready(manifest):
                return manifest
        time.sleep(_POLL)
    raise InputError(f"the first rank has not begun the cache {place} in {LONGEST_WAIT / 3600:.0f} hours.")


def _scratch(place: Place) -> Path:
    """A folder for packed text on its way: on the disk of the cache, which has room for it."""
    parent = place.fetched if isinstance(place, RemotePlace) else Path(place.location)
    scratch = parent / _SCRATCH
    if scratch.exists():
        shutil.rmtree(scratch)  # of a harvest that was killed
    scratch.mkdir(parents=True)
    return scratch


@contextlib.contextmanager
def _producing(language_model: LanguageModel, source: Source, token_ids: Tensor) -> Iterator[Produce]:
    at_once = TOKENS_AT_ONCE.get(language_model.model.device.type, TOKENS_AT_ONCE["cpu"])
    at_once = max(1, at_once // source.context_length)
    with reading(language_model.model, source.hookpoints) as read:
        yield lambda sequences: (read(token_ids[some]) for some in sequences.split(at_once))


def _check_context_length(language_model: LanguageModel, context_length: int) -> None:
    longest = getattr(language_model.model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and context_length > longest:
        raise InputError(
            f"`context_length` must be at most {longest} for {language_model.name}, got {context_length}."
        )
