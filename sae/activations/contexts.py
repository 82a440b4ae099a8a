"""Reading a cache context by context: whole sequences of rows in text order, with their tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor

from sae.activations.cache import ActivationCache, Split
from sae.errors import InputError


class Contexts(NamedTuple):
    """Some whole contexts of one hookpoint."""

    sequence: Int[Tensor, " sequences"]
    """Row of the cache's `token_ids`."""
    token_ids: Int[Tensor, "sequences context"]
    x: Float[Tensor, "sequences context d_model"]
    """Activations in the cache's dtype."""


def whole_contexts(
    cache: ActivationCache, split: Split, hookpoint: str, tokens_at_once: int = 8192
) -> Iterator[Contexts]:
    """All contexts of a split, shard by shard, each with its rows in text order.

    Train rows lie mixed inside a shard; the cache's order file says where each belongs. A shard is
    mapped, not loaded, so memory is that of one batch and of the order of one shard. The contexts of
    the train split come in the random order that they were harvested in: the first ones are a fair
    sample of all.

    Raises:
        InputError: if the cache does not know where its rows come from, or its order file disagrees.
    """
    token_ids = token_ids_of(cache)
    context = token_ids.shape[1]
    at_once = max(1, tokens_at_once // context)
    order = _order(cache, split, context)
    begin = 0
    for shard in cache.shards(split):
        origin, place = order[begin : begin + shard.rows].sort()
        begin += shard.rows
        whole = len(origin) % context == 0
        if whole:
            origin = origin.reshape(-1, context)
            whole = bool((origin % context == torch.arange(context)).all())
        if not whole:
            raise InputError(
                f"{cache.folder / 'order.safetensors'} does not describe whole contexts; harvest again."
            )
        x = shard.tensor(hookpoint)
        for sequence, rows in zip(
            (origin[:, 0] // context).split(at_once), place.reshape(-1, context).split(at_once), strict=True
        ):
            yield Contexts(sequence, token_ids[sequence], x[rows])


def token_ids_of(cache: ActivationCache) -> Int[Tensor, "sequences context"]:
    """The contexts of a cache: train sequences first, then held-out ones.

    Raises:
        InputError: if its rows were imported without tokens.
    """
    if not (cache.folder / "sequences.safetensors").is_file():
        raise InputError(f"the cache {cache.folder} holds no token ids; directions cannot be read from it.")
    return cache.token_ids.long()


def held_out_token_ids(cache: ActivationCache) -> Int[Tensor, "sequences context"]:
    """The held-out contexts."""
    return token_ids_of(cache)[cache.manifest["splits"]["train"]["sequences"] :]


def _order(cache: ActivationCache, split: Split, context: int) -> Int[Tensor, " rows"]:
    """Of each row on disk, sequence * context + position."""
    rows = cache.n_rows(split)
    if split == "held_out":
        return cache.n_rows("train") + torch.arange(rows)
    order = load_file(cache.folder / "order.safetensors")["order"]
    if len(order) != rows:
        raise InputError(
            f"{cache.folder / 'order.safetensors'} orders {len(order):,} rows, the train split has {rows:,};"
            " harvest again."
        )
    return order
