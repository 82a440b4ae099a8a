"""The terms of the training loss that all kinds share, on normalised inputs."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.dictionaries import SparseAutoencoder
from sae.dictionaries.autoencoder import TrainingCode
from sae.ops.mean_square import mean_square
from sae.ops.sparse import sparse_decode


def auxk_loss(
    dictionary: SparseAutoencoder,
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
        residual: u - u_hat; detached here.
        code: the batch's code.
        dead: the dead latents, at least one.
        energy: mean of e^2 over rows and coordinates, of all ranks; the loss is in units of it.

    References:
        Scaling and evaluating sparse autoencoders, Gao et al. 2024, arXiv 2406.04093, appendix A.2.
    """
    residual = residual.detach()
    k = min(len(dead), max(1, dictionary.d_model // 2))
    e_hat = sparse_decode(dictionary.revived_code(code, residual, dead, k), dictionary.W_dec)
    missed = dictionary.weigh(residual - e_hat)
    return mean_square(missed) / energy.clamp_min(torch.finfo(residual.dtype).tiny)


def pre_activation_loss(
    dictionary: SparseAutoencoder, code: TrainingCode, dead: Int[Tensor, " dead"]
) -> Float[Tensor, ""]:
    """How much dead latents lack to fire: sum over them, mean over rows.

    Its gradient lifts a dead latent on all rows alike, until it fires on some.

    References:
        Dictionary Learning Optimization Techniques, Conerly et al., Transformer Circuits, January 2025.
    """
    return (-dictionary.dead_pre_acts(code, dead)).relu().sum() / len(code.inputs)
