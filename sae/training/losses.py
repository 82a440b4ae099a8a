"""The terms of the training loss, on normalised inputs."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.dictionaries import SparseAutoencoder
from sae.dictionaries.autoencoder import TrainingCode
from sae.ops.sparse import sparse_decode, sparse_pre_acts, top_k


def reconstruction_loss(
    u: Float[Tensor, "rows d_model"], u_hat: Float[Tensor, "rows d_model"]
) -> Float[Tensor, ""]:
    """Mean over rows of |u - u_hat|^2 / d_model: the batch's FVU, as u has mean squared norm d_model."""
    return (u - u_hat).square().mean()


def auxk_loss(
    dictionary: SparseAutoencoder,
    u: Float[Tensor, "rows d_model"],
    residual: Float[Tensor, "rows d_model"],
    code: TrainingCode,
    dead: Int[Tensor, " dead"],
) -> Float[Tensor, ""]:
    """Lets dead latents explain what the living ones left over; how they come back.

    With the residual e = u - u_hat held fixed, the d_model / 2 strongest pre-activations among the
    dead latents give e_hat, and the loss is |e - e_hat|^2 / |e|^2. Its gradient reaches W_dec, and
    through the selected pre-activations W_enc and b_enc; b_dec takes no part (adding it again is a
    defect that public trainers had).

    Args:
        dictionary: gives the weights.
        u: normalised inputs.
        residual: u - u_hat; detached here.
        code: the batch's code with all its pre-activations.
        dead: the dead latents, at least one.

    References:
        Scaling and evaluating sparse autoencoders, Gao et al. 2024, arXiv 2406.04093, appendix A.2.
    """
    residual = residual.detach()
    k = min(len(dead), max(1, dictionary.d_model // 2))
    strongest = top_k(code.pre_acts[:, dead], k)
    strongest = strongest._replace(indices=dead[strongest.indices])
    revived = sparse_pre_acts(u, dictionary.W_enc_rows, dictionary.b_enc, strongest)
    revived = revived._replace(values=revived.values.relu())
    e_hat = sparse_decode(revived, dictionary.W_dec)
    return (residual - e_hat).square().sum() / residual.square().sum().clamp_min(torch.finfo(u.dtype).tiny)
