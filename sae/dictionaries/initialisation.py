"""How the directions of a dictionary start."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F


def tied_rows(n_latents: int, d_model: int) -> Float[Tensor, "n_latents d_model"]:
    """Random unit rows, uniform on the sphere, for decoder and encoder alike.

    An encoder that starts as the decoder's transpose is what keeps latents from dying early.

    References:
        Scaling and evaluating sparse autoencoders, Gao et al. 2024, arXiv 2406.04093.
    """
    return F.normalize(torch.randn(n_latents, d_model), dim=-1)
