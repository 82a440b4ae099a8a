"""Token purity of a code: how much a firing says of the token at hand, beside what chance gives."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.inspection.input_tokens import TokenCounts
from sae.inspection.null import clarities
from sae.ops.sparse import SparseLatents


class Purity(NamedTuple):
    """Mean clarity over firings, of the code and of the same code on shuffled tokens."""

    purity: float
    null: float


def token_purity(
    code: SparseLatents, tokens: Int[Tensor, " rows"], n_latents: int, vocabulary: int, seed: int = 0
) -> Purity | None:
    """The clarity of the latent of a firing drawn at random; None where nothing fires.

    Clarity is 1 - H(q) / H(p): q how a latent's activation falls on tokens, p the text. A latent whose
    coefficients have both signs counts as two, one for each, which is kinder to it. The null deals the same
    rows other tokens, by one permutation: every latent keeps how often and how strongly it fires. Rare
    latents look clear by chance alone, so a purity means nothing without it.

    Args:
        code: of rows.
        tokens: of the same rows.
        n_latents: latents of the code.
        vocabulary: tokens there are.
        seed: of the permutation.
    """
    if len(code.values) == 0 or len(tokens) == 0:
        return None
    firing = code.values != 0
    rows, values = code.rows[firing].cpu(), code.values[firing].abs().cpu()
    latents = (2 * code.indices + (code.values < 0))[firing].cpu()
    tokens = tokens.cpu().long()
    shuffled = tokens[torch.randperm(len(tokens), generator=torch.Generator().manual_seed(seed))]
    found = [_of(latents, rows, values, dealt, 2 * n_latents, vocabulary) for dealt in (tokens, shuffled)]
    return Purity(*found)


def _of(
    latents: Int[Tensor, " active"],
    rows: Int[Tensor, " active"],
    values: Float[Tensor, " active"],
    tokens: Int[Tensor, " rows"],
    n_latents: int,
    vocabulary: int,
) -> float:
    counts = TokenCounts(n_latents, vocabulary)
    counts.add(tokens, latents, tokens[rows], values)
    firings = counts.firings()
    return float((clarities(counts) * firings).sum() / firings.sum())
