"""What two dictionaries of the same data have in common: directions, and the firings of each row."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from sae.dictionaries import SparseAutoencoder


def matched(a: Float[Tensor, "n d_model"], b: Float[Tensor, "n d_model"]) -> Int[Tensor, " n"]:
    """Of each row of a, the row of b that stands for it: one to one, with the largest sum of cosines.

    Signs count: a latent is positive, so the opposite direction says something else.
    """
    _, rows_of_b = linear_sum_assignment(-(a @ b.T).double().cpu().numpy())
    return torch.from_numpy(rows_of_b).to(a.device)


def agreement(a: Float[Tensor, "n d_model"], b: Float[Tensor, "n d_model"]) -> float:
    """Mean cosine of matched unit rows: 1 = the same directions but for their order.

    References:
        Position: Mechanistic Interpretability Should Prioritize Feature Consistency in SAEs, Song et al.
        2025, arXiv 2505.20254 (PW-MCC; there of |cos|).
    """
    return float((a * b[matched(a, b)]).sum(1).mean())


def decoder_projection(
    u: Float[Tensor, "rows d_model"],
    b_dec: Float[Tensor, " d_model"],
    directions: Float[Tensor, "n_latents d_model"],
    n: int,
) -> float:
    """The (n * rows + 1)-th largest entry of (u - b_dec) @ directions.T over all rows: s_n^dec.

    Directions that mix several features project on more rows than they should, so this is smallest where
    they mix least. n is to be above the largest L0 compared, and the same for all of them.

    References:
        Sparse but Wrong: Incorrect L0 Leads to Incorrect Features in Sparse Autoencoders, Chanin and
        Garriga-Alonso 2025, arXiv 2508.16560; as in its published code.
    """
    entries = ((u - b_dec) @ directions.T).flatten()
    return float(entries.sort(descending=True).values[min(n * len(u), len(entries) - 1)])


def mean_cosine(directions: Float[Tensor, "n d_model"]) -> float:
    """Mean |cos| over pairs of different rows (c_dec of the same paper)."""
    n = len(directions)
    return float(((directions @ directions.T).abs().sum() - n) / (n * (n - 1)))


@torch.no_grad()
def pursuit_order(
    v: Float[Tensor, "rows d_model"], directions: Float[Tensor, "n d_model"], most: int
) -> Int[Tensor, "rows most"]:
    """The directions that orthogonal matching pursuit takes for each row, in the order it takes them.

    Each round takes the one with the largest positive product with what the earlier ones, together, leave
    of the row. So the first m columns are the code with m entries, for every m at once.

    References:
        Orthogonal Matching Pursuit, Pati, Rezaiifar and Krishnaprasad 1993.
    """
    residual, rows = v.clone(), torch.arange(len(v), device=v.device)
    basis = v.new_zeros(len(v), most, v.shape[1])
    order = torch.zeros(len(v), most, dtype=torch.long, device=v.device)
    taken = torch.zeros(len(v), len(directions), dtype=torch.bool, device=v.device)
    for m in range(most):
        products = (residual @ directions.T).masked_fill(taken, -torch.inf)
        order[:, m] = chosen = products.argmax(1)
        taken[rows, chosen] = True
        axis = directions[chosen]
        for _ in range(2):  # once leaves rounding behind where directions are close
            along = torch.einsum("rmd,rd->rm", basis[:, :m], axis)
            axis = axis - torch.einsum("rm,rmd->rd", along, basis[:, :m])
        norm = axis.norm(dim=1, keepdim=True)
        axis = torch.where(norm > 1e-4, axis / norm.clamp_min(1e-4), 0.0)
        residual -= (residual * axis).sum(1, keepdim=True) * axis
        basis[:, m] = axis
    return order


@torch.no_grad()
def shared_firings(
    x: Float[Tensor, "rows d_model"], a: SparseAutoencoder, b: SparseAutoencoder, most: int
) -> Float[Tensor, " most"]:
    """Latents per row that both dictionaries take beyond chance, when each takes m = 1 ... most by pursuit.

    Latents are matched by their directions. Chance is m² / n_latents: two random choices of m share as many.
    What the data have, both find: while m is below the number of directions that a row is made of, nearly
    every further one is shared. Beyond it pursuit explains noise and the errors of the dictionary, and these
    are not the same in two dictionaries of other seeds.

    References:
        Stability Selection, Meinshausen and Bühlmann 2010 (what is found again is kept).
    """
    ranks = []
    for dictionary in (a, b):
        u = dictionary.normalise(x) - dictionary.b_dec
        order = pursuit_order(u, dictionary.directions, most)
        rank = torch.full((len(x), dictionary.n_latents), most, device=x.device)
        ranks.append(rank.scatter_(1, order, torch.arange(most, device=x.device).expand_as(order)))
    later = torch.maximum(ranks[0], ranks[1][:, matched(a.directions, b.directions)])
    counts = torch.bincount(later.flatten(), minlength=most + 1)[:most]
    m = torch.arange(1, most + 1, device=x.device)
    return counts.cumsum(0).float() / len(x) - m**2 / a.n_latents
