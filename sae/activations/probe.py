"""A few contexts run before a harvest: widths, whether position 0 stands out, which coordinates do."""

from __future__ import annotations

import sys
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sae.activations.hookpoints import residuals
from sae.activations.language_model import LanguageModel
from sae.errors import InputError
from sae.ops.int8 import outlier_coordinates

CONTEXTS = 8
FIRST_POSITION_STANDS_OUT = 4.0
"""Times that rows of position 0 are longer than the median row, from which on a warning is due."""


class Probe(NamedTuple):
    """What a few contexts show of a model."""

    d_model: dict[str, int]
    """Width at each hookpoint."""
    outliers: dict[str, list[int]]
    """Coordinates of each hookpoint that int8 would have to keep apart."""
    first_position: dict[str, float]
    """Mean length of rows at position 0 over the median length of all others, at each hookpoint."""


def probe(
    language_model: LanguageModel,
    hookpoints: list[str],
    token_ids: Int[Tensor, "sequences context"],
    cached: Bool[Tensor, "sequences context"] | None,
) -> Probe:
    """Runs a few contexts, spread over all that are given.

    Raises:
        InputError: if the model cannot run contexts of that length.
    """
    chosen = torch.arange(0, len(token_ids), max(1, len(token_ids) // CONTEXTS))[:CONTEXTS]
    context = token_ids.shape[1]
    try:
        found = residuals(language_model.model, token_ids[chosen], hookpoints)
    except (IndexError, RuntimeError) as error:
        raise InputError(
            f"{language_model.name} cannot run a context of `context_length`={context}"
            f" tokens ({str(error).splitlines()[0]}); lower it."
        ) from error
    mask = torch.ones(len(chosen), context, dtype=torch.bool) if cached is None else cached[chosen]
    outliers, first = {}, {}
    for name, x in found.items():
        x = x.float().cpu()
        outliers[name] = outlier_coordinates(x[mask]).tolist() if mask.any() else []
        length = x.norm(dim=-1)
        first[name] = float(length[:, 0].mean() / length[:, 1:].median()) if context > 1 else 1.0
    return Probe({name: x.shape[-1] for name, x in found.items()}, outliers, first)


def warn_of_first_position(found: Probe, excluded: bool) -> None:
    """Says where position 0 would set the mean, the scale and the loss of a training."""
    for name, ratio in found.first_position.items():
        if ratio > FIRST_POSITION_STANDS_OUT and not excluded:
            print(
                f"warning: at {name}, rows of position 0 are {ratio:.0f} times as long as others; they will"
                " set the scale and the loss. `exclude_first_position: true` leaves them out.",
                file=sys.stderr,
            )
