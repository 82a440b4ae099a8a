"""Which tokens a direction makes more or less likely: its product with the unembedding."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from sae.inspection.latent import OutputToken


def output_tokens(
    directions: Float[Tensor, "n d_model"], W_U: Float[Tensor, "vocabulary d_model"], count: int
) -> list[tuple[list[OutputToken], list[OutputToken]]]:
    """For each direction, the tokens whose logits a step along it raises most, and lowers most.

    Args:
        directions: unit vectors of the residual stream.
        W_U: the unembedding with the final norm's gain folded in and the vocabulary's mean removed, as
            `sae.activations.language_model.unembedding` gives it.
        count: how many of each.

    References:
        interpreting GPT: the logit lens, nostalgebraist 2020.
    """
    logits = directions.to(W_U) @ W_U.T
    count = min(count, len(W_U))
    found = []
    for raised, lowered in zip(logits.topk(count).indices, (-logits).topk(count).indices, strict=True):
        row = logits[len(found)]
        found.append((_tokens(row, raised, W_U), _tokens(row, lowered, W_U)))
    return found


def _tokens(logits: Tensor, chosen: Tensor, W_U: Tensor) -> list[OutputToken]:
    norms = W_U[chosen].norm(dim=-1).clamp_min(torch.finfo(W_U.dtype).tiny)
    columns = (chosen.tolist(), logits[chosen].tolist(), (logits[chosen] / norms).tolist())
    return [OutputToken(token, logit, cosine) for token, logit, cosine in zip(*columns, strict=True)]
