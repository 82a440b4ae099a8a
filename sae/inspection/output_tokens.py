"""Which tokens a direction makes more likely: its product with the unembedding."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor


class OutputToken(NamedTuple):
    """One token that a direction raises."""

    token: int
    logit: float
    """Change of the token's logit over the vocabulary's mean, per unit along the direction after the norm."""
    cosine: float
    """Cosine between the direction and the token's folded, centred column of W_U."""


def output_tokens(
    direction: Float[Tensor, " d_model"], W_U: Float[Tensor, "vocabulary d_model"], count: int
) -> list[OutputToken]:
    """The tokens whose logits a step along `direction` raises most.

    Args:
        direction: a unit vector of the residual stream.
        W_U: the unembedding with the final norm's gain folded in and the vocabulary's mean removed, as
            `sae.activations.language_model.unembedding` gives it.
        count: how many.

    References:
        interpreting GPT: the logit lens, nostalgebraist 2020.
    """
    logits = W_U @ direction.to(W_U)
    best = logits.topk(min(count, len(logits)))
    norms = W_U[best.indices].norm(dim=-1).clamp_min(torch.finfo(W_U.dtype).tiny)
    cosines = best.values / norms
    return [
        OutputToken(int(token), float(logit), float(cosine))
        for token, logit, cosine in zip(best.indices, best.values, cosines, strict=True)
    ]
