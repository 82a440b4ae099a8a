"""Whether imported activations are those of a language model, so that their latents can be read with it."""

from __future__ import annotations

import contextlib
import math
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sae.activations.exchange.reading import RowsToImport
from sae.activations.hookpoints import check_hookpoints, hookpoint_names, visiting, without_cache
from sae.activations.language_model import (
    LanguageModel,
    load_language_model,
    vocabulary_hash,
    weights_hash,
)
from sae.errors import InputError

MOST_DIFFERENT = 0.05
"""Median over rows of |x - x of the model| / |x of the model| that passes; bfloat16 makes about 0.01."""
_SEQUENCES = 3


def check_model(name: str, what: RowsToImport) -> dict[str, Any]:
    """Runs the model on a few sequences and compares; returns the model's part of the manifest.

    Raises:
        InputError: if it cannot be loaded, lacks a hookpoint, has too few tokens, or computes something
            else from these tokens.
    """
    if what.token_ids is None:
        raise InputError("`model` needs `token_ids`: latents are read by the tokens they fire on.")
    if not what.spans.are_whole:
        lengths = what.spans.lengths
        raise InputError(
            f"`model` needs sequences of one length, got {int(lengths.min())} to {int(lengths.max())} rows;"
            " drop the shorter ones, or leave `model` out."
        )
    language_model = load_language_model(name)
    check_hookpoints(language_model.model, list(what.arrays))
    n = len(what.spans.lengths)
    chosen = sorted({0, n // 2, n - 1})[:_SEQUENCES]
    token_ids = torch.stack([what.tokens_of(sequence) for sequence in chosen])
    vocabulary = len(next(language_model.model.get_input_embeddings().parameters()))
    if token_ids.max() >= vocabulary:
        raise InputError(
            f"`token_ids` go up to {int(token_ids.max()):,}, the model {name} has {vocabulary:,} tokens; they"
            " are not its own."
        )
    for hookpoint, array in what.arrays.items():
        given = torch.stack([what.rows_of(array, sequence).float() for sequence in chosen])
        _compare(hookpoint, given, language_model, token_ids)
    return {
        "model": name,
        "tokenizer": name,
        "model_hash": weights_hash(language_model.model),
        "vocabulary_hash": vocabulary_hash(language_model.tokenizer),
    }


def _compare(hookpoint: str, given: Tensor, language_model: LanguageModel, token_ids: Tensor) -> None:
    """Raises `InputError` unless x is what the model has there, and has nowhere else."""
    name = language_model.name
    found = _differences(given, language_model, token_ids)
    nearest = min(found, key=lambda other: found[other])
    if found[hookpoint] <= MOST_DIFFERENT and found[hookpoint] == found[nearest]:
        return
    raise InputError(
        f"the activations are not what {name} has at {hookpoint} for these tokens: they differ by"
        f" {found[hookpoint]:.2g} of a row's length; nearest is {nearest} ({found[nearest]:.2g}), where up to"
        f" {MOST_DIFFERENT:g} would be rounding. Are the tokens, the hookpoint and the begin of each sequence"
        " right? Without `model` they can be imported still."
    )


@torch.inference_mode()
def _differences(given: Tensor, language_model: LanguageModel, token_ids: Tensor) -> dict[str, float]:
    """At every hookpoint of the model, how far the activations are from its own."""
    model, found = language_model.model, {}

    def measure(hookpoint: str, x: Tensor) -> None:
        x = x.float()
        if x.shape != given.shape:
            raise InputError(
                f"`model` {language_model.name} has d_model={x.shape[-1]}, the activations have"
                f" {given.shape[-1]}."
            )
        far = float(((given - x).norm(dim=-1) / x.norm(dim=-1)).median())
        found[hookpoint] = math.inf if math.isnan(far) else far

    with contextlib.ExitStack() as stack:
        for name in hookpoint_names(model):
            stack.enter_context(visiting(model, name, partial(measure, name)))
        try:
            model(input_ids=token_ids.long(), **without_cache(model))
        except (IndexError, RuntimeError) as error:
            raise InputError(
                f"`model` {language_model.name} cannot run sequences of {token_ids.shape[1]} tokens"
                f" ({str(error).splitlines()[0]})."
            ) from error
    return found
