"""The terms of the training loss, on normalised inputs."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.dictionaries import SparseAutoencoder
from sae.dictionaries.autoencoder import TrainingCode
from sae.ops.sparse import sparse_decode, sparse_pre_acts, top_k


def reconstruction_loss(residual: Float[Tensor, "rows d_model"]) -> Float[Tensor, ""]:
    """Mean over rows of |u - u_hat|^2 / d_model: the batch's FVU, as u has mean squared norm d_model."""
    return residual.square().mean()


def auxk_loss(
    dictionary: SparseAutoencoder,
    u: Float[Tensor, "rows d_model"],
    residual: Float[Tensor, "rows d_model"],
    code: TrainingCode,
    dead: Int[Tensor, " dead"],
    energy: Float[Tensor, ""],
) -> Float[Tensor, ""]:
    """Lets dead latents explain what the living ones left over; how they come back.

    With the residual e = u - u_hat held fixed, the d_model / 2 strongest pre-activations among the
    dead latents give e_hat, and the loss is the mean of (e - e_hat)^2 over that of e^2. Its gradient
    reaches W_dec, and through the selected pre-activations W_enc and b_enc; b_dec takes no part (adding it
    again is a defect that public trainers had).

    The mean of e^2 is that of the step before: known on every rank without asking the others, so that the
    gradients of several ranks add up to those of one, and from one step to the next hardly different.

    Args:
        dictionary: gives the weights.
        u: normalised inputs.
        residual: u - u_hat; detached here.
        code: the batch's code with all its pre-activations.
        dead: the dead latents, at least one.
        energy: mean of e^2 over rows and coordinates, of all ranks; the loss is in units of it.

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
    return (residual - e_hat).square().mean() / energy.clamp_min(torch.finfo(u.dtype).tiny)
