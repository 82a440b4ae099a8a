"""What is known of a cache before it is made: its width, its rows, its bytes and the room for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sae.activations import ActivationDataModule, Source
from sae.activations.cache import read_manifest
from sae.activations.cache.encoding import Encoding, row_bytes
from sae.activations.cache.format import has_manifest, is_whole
from sae.activations.cache.places import Place, place_at
from sae.activations.datamodule import open_or_harvest
from sae.activations.model_size import ModelSize, model_size
from sae.errors import InputError

OTHER_BYTES = 16
"""Bytes a row in the files of tokens, documents and order."""


@dataclass(frozen=True)
class CachePlan:
    """A cache as it is, or as it will be."""

    place: Place
    d_model: int
    row_dtype: torch.dtype
    """That rows are read in."""
    train_rows: int
    rows: int
    """Of both splits."""
    total_bytes: int
    """Disk that it takes once it is whole, within `data.source.disk`."""
    bytes_to_come: int
    """Those not written yet; 0 for a finished cache."""
    tokens_to_run: int
    """Tokens that the language model is still to read."""
    model: ModelSize | None
    """The language model; None where a finished cache makes it unnecessary."""
    is_rolling: bool
    """Whether the language model runs beside the training."""

    @property
    def free_bytes(self) -> int | None:
        """Bytes that can be written where it lies; None = no limit."""
        return self.place.free_bytes()


def plan_cache(data: ActivationDataModule) -> CachePlan:
    """Looks at the cache if it is finished; else reckons from `data.source`, with no text and no weights.

    Raises:
        InputError: if there is neither a cache nor a source, or the source's model is not to be had.
    """
    place, source = place_at(data.location), data.source
    manifest = read_manifest(place) if has_manifest(place) else {}
    if data.world is not None and not manifest:
        data.prepare_data()  # seconds, and needs nothing
        manifest = read_manifest(place)
    if source is None or (manifest.get("finished") and is_whole(place, manifest)):
        if not manifest:
            open_or_harvest(place, None)  # raises: there is nothing to make it from
        data.setup()
        cache = data.cache
        train = cache.n_rows("train")
        size = sum(place.sizes().values())
        rows = train + cache.n_rows("held_out")
        return CachePlan(
            place, data.d_model, cache.encoding.row_dtype, train, rows, size, 0, 0, None, is_rolling=False
        )
    _check_hookpoint(data, source)
    return _from_source(source, place)


def _check_hookpoint(data: ActivationDataModule, source: Source) -> None:
    """Raises `InputError` where `data.hookpoint` is open or not among those cached."""
    if (data.hookpoint or source.hookpoints[0]) in source.hookpoints and (
        data.hookpoint or len(source.hookpoints) == 1
    ):
        return
    raise InputError(
        f"`hookpoint` must be one of {', '.join(source.hookpoints)}, got {data.hookpoint or None!r};"
        " give --data.hookpoint."
    )


def _from_source(source: Source, place: Place) -> CachePlan:
    model = model_size(source.model, source.hookpoints)
    dtype = model.dtype if source.dtype == "auto" else getattr(torch, source.dtype)
    # Which coordinates int8 keeps apart, a few at most, shows only once the model runs.
    encoding = Encoding(dtype, {name: [] for name in source.hookpoints})
    of_text = source.context_length - source.bos_in_every_context
    contexts = max(1, source.n_tokens // max(1, of_text))
    rows = contexts * (source.context_length - source.exclude_first_position)
    each = row_bytes(dict.fromkeys(source.hookpoints, model.d_model), encoding) + OTHER_BYTES
    limit = source.disk_bytes()
    total = rows * each if limit is None else min(limit, rows * each)
    return CachePlan(
        place=place,
        d_model=model.d_model,
        row_dtype=encoding.row_dtype,
        train_rows=round(rows * (1 - source.held_out)),
        rows=rows,
        total_bytes=total,
        bytes_to_come=max(0, total - sum(place.sizes().values())),
        tokens_to_run=contexts * source.context_length,
        model=model,
        is_rolling=total < rows * each,
    )
