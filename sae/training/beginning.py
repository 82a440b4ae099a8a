"""What a dictionary begins with: the scale of the data, its directions, or earlier weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional as F

from sae.dictionaries import SparseAutoencoder
from sae.dictionaries.linear_encoder import LinearEncoder
from sae.dictionaries.storage import read_dictionary_config, read_dictionary_tensors
from sae.errors import InputError
from sae.ops.moments import Moments
from sae.training.recipe import Recipe
from sae.training.rows import RowSource

Start = Literal["sphere", "subspace"]
ROWS = 16_384
"""Rows of the train split that firing rates are set on."""


@dataclass(frozen=True)
class Beginning:
    """Settings of the first step."""

    start: Start = "sphere"
    whiten: bool = False
    init_from: str | None = None

    def check(self) -> None:
        """Raises `InputError` for a value out of range."""
        if self.start not in ("sphere", "subspace"):
            raise InputError(f"`start` must be sphere or subspace, got {self.start!r}.")
        if self.init_from is not None:
            read_dictionary_config(self.init_from)

    def begin(self, dictionary: SparseAutoencoder, rows: RowSource, recipe: Recipe) -> None:
        """Centres and scales the dictionary for the data, and gives it its first weights.

        Raises:
            InputError: if it cannot be whitened, or `init_from` is of another kind or shape.
        """
        dictionary.l0_factor = recipe.l0_start_for(dictionary)
        moments = rows.moments
        dictionary.set_input_statistics(moments.mean, moments.mean_squared_norm)
        if self.start == "subspace":
            start_in_subspace(dictionary, moments)
        if self.whiten:
            if not isinstance(dictionary, LinearEncoder):
                raise InputError(
                    f"`whiten` needs a kind with a linear encoder, got {type(dictionary).__name__}."
                )
            dictionary.set_whitening(moments.covariance)
        if self.init_from is not None:
            warm_start(dictionary, self.init_from)
        elif dictionary.begins_with_rows:
            dictionary.begin(dictionary.normalise(rows.first_rows(ROWS)))


@torch.no_grad()
def start_in_subspace(dictionary: SparseAutoencoder, moments: Moments) -> None:
    """Directions that vary as the data does: unit rows of z C^1/2, z normal, C the data's covariance.

    Where rows lie near a subspace, directions from the whole sphere point mostly out of it and die.

    References:
        Attention Layers Add Into Low-Dimensional Residual Subspaces, Wang et al. 2025, arXiv 2508.16929
        (active subspace initialisation; there a hard projection).
    """
    variances, axes = torch.linalg.eigh(moments.covariance)
    root = (axes * variances.clamp_min(0).sqrt() @ axes.T).to(dictionary.W_dec)
    ids = torch.arange(dictionary.n_latents, device=root.device)
    dictionary.set_latents(ids, F.normalize(dictionary.W_dec @ root, dim=1))


def warm_start(dictionary: SparseAutoencoder, folder: str) -> None:
    """Takes the weights of a saved dictionary of the same kind and shape; the scaling stays the data's.

    Raises:
        InputError: if kind or shape differ.
    """
    config, tensors = read_dictionary_config(folder), read_dictionary_tensors(folder)
    shape = tuple(config.get(name) for name in ("kind", "d_model", "n_latents"))
    mine = (type(dictionary).__name__, dictionary.d_model, dictionary.n_latents)
    if shape != mine:
        raise InputError(
            "`init_from` must hold a dictionary of the same kind and widths: there (kind, d_model,"
            f" n_latents) is {shape}, here {mine}."
        )
    try:
        dictionary.take(tensors)
    except (KeyError, RuntimeError) as error:
        raise InputError(f"the dictionary in {folder} does not match its config.json: {error}") from error
