"""Which latents of one dictionary come back in dictionaries of other seeds, and how often each was caught."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from scipy.special import betainc, betaincinv
from torch import Tensor
from torch.nn import functional as F

from sae.errors import InputError
from sae.ops.geometry import mean_max_cosine

FLOOR = 0.7
"""|cos| below which no two latents are taken for the same feature, however wide the rows."""
_CHUNK = 1024
"""Rows of one dictionary that are held against all of another at a time: memory is this times n numbers."""


class Captures(NamedTuple):
    """Features that were caught in some seeds; a latent of a seed is in one feature at most."""

    members: Int[Tensor, "features seeds"]
    """The latent that a feature is in each seed; -1 = not caught there."""

    @property
    def histories(self) -> Bool[Tensor, "features seeds"]:
        """Whether a seed caught a feature."""
        return self.members >= 0

    @property
    def times(self) -> Int[Tensor, " features"]:
        """In how many seeds each feature was caught, 1 to all."""
        return self.histories.sum(1)

    @property
    def frequencies(self) -> Int[Tensor, " seeds"]:
        """f_1 ... f_S: the number of features caught in exactly that many seeds."""
        return torch.bincount(self.times, minlength=self.members.shape[1] + 1)[1:]


def cosine_exceeds(t: float, d_model: int, signed: bool = True) -> float:
    """P(cos > t), or P(|cos| > t), of two random directions in d_model dimensions, t >= 0; exact.

    P(|cos| > t) = I_{1 - t²}((d_model - 1) / 2, 1 / 2), the regularised incomplete beta function.
    """
    if d_model == 1:
        return (0.5 if signed else 1.0) * float(t < 1)
    both = float(betainc((d_model - 1) / 2, 0.5, 1 - t * t))
    return both / 2 if signed else both


def null_cosine(n: int, d_model: int, quantile: float = 0.999, signed: bool = True) -> float:
    """The quantile of a random direction's largest cos (or |cos|) with n random directions; exact.

    Given one direction, its cosines with the n others are independent. So the largest stays below t with
    probability (1 - P(cos > t))^n, and t solves (1 - P)^n = quantile.

    Raises:
        InputError: for arguments out of range.
    """
    _check_shape(n, d_model)
    if not 0 < quantile < 1:
        raise InputError(f"`quantile` must be in (0, 1), got {quantile}.")
    exceeds = -math.expm1(math.log(quantile) / n)
    both = 2 * exceeds if signed else exceeds
    if d_model == 1 or both >= 1:
        return 1.0 if d_model == 1 else 0.0
    return math.sqrt(1 - float(betaincinv((d_model - 1) / 2, 0.5, both)))


def match_threshold(n: int, d_model: int, signed: bool = True) -> float:
    """The larger of `FLOOR` and what one random latent in a thousand has with its nearest of n."""
    return max(FLOOR, null_cosine(n, d_model, signed=signed))


def mutual_matches(
    a: Float[Tensor, "n_a d_model"], b: Float[Tensor, "n_b d_model"], threshold: float, signed: bool = True
) -> tuple[Int[Tensor, " n_a"], Float[Tensor, " n_a"]]:
    """Of each row of a, the row of b that it is nearest to and that is nearest to it, and their cosine.

    -1 where there is none above the threshold. Latents have a sign, as they are positive: by default the
    opposite direction is another feature. Where components have none (PCA), `signed=False` takes |cos|.
    """
    nearest_b, cosine = _nearest(a, b, signed)
    nearest_a, _ = _nearest(b, a, signed)
    if len(a) == 0 or len(b) == 0:
        return nearest_b, cosine
    is_mutual = nearest_a[nearest_b] == torch.arange(len(a), device=a.device)
    found = is_mutual & (cosine > threshold)
    return torch.where(found, nearest_b, -1), cosine


def capture_histories(
    dictionaries: Sequence[Float[Tensor, "_ d_model"]],
    alive: Sequence[Bool[Tensor, " _"]],
    threshold: float,
    signed: bool = True,
) -> Captures:
    """Gathers the latents of several seeds into features, each with the seeds that caught it.

    Pairs of mutually nearest latents of two seeds join, the nearest pair first, as long as no feature comes
    to hold two latents of a seed. A latent that joins with none is a feature caught once; dead ones have
    no part. Features come with those caught most often first.

    Args:
        dictionaries: directions, a row per latent; the seeds may differ in how many they have.
        alive: which latents fire, for each.
        threshold: the cosine above which two latents are the same feature, see `match_threshold`.
        signed: whether opposite directions differ.

    Raises:
        InputError: for fewer than two seeds, or shapes that do not fit.
    """
    _check_seeds(dictionaries, alive)
    living = [mask.nonzero().squeeze(1) for mask in alive]
    rows = [F.normalize(d[ids], dim=1) for d, ids in zip(dictionaries, living, strict=True)]
    pairs = []
    for i, j in itertools.combinations(range(len(rows)), 2):
        match, cosine = mutual_matches(rows[i], rows[j], threshold, signed)
        for latent in (match >= 0).nonzero().squeeze(1).tolist():
            pairs.append((float(cosine[latent]), (i, latent), (j, int(match[latent]))))
    pairs.sort(key=lambda pair: (-pair[0], pair[1:]))
    groups = {(i, latent): {i: latent} for i, ids in enumerate(living) for latent in range(len(ids))}
    for _, one, other in pairs:
        first, second = groups[one], groups[other]
        if first.keys().isdisjoint(second):
            first.update(second)
            groups.update(dict.fromkeys(second.items(), first))
    distinct = list({id(group): group for group in groups.values()}.values())
    distinct.sort(key=lambda group: (-len(group), sorted(group.items())))
    members = torch.full((len(distinct), len(rows)), -1)
    for feature, group in enumerate(distinct):
        for seed, latent in group.items():
            members[feature, seed] = living[seed][latent]
    return Captures(members)


def stability_scores(
    dictionaries: Sequence[Float[Tensor, "_ d_model"]],
    alive: Sequence[Bool[Tensor, " _"]],
    threshold: float,
    signed: bool = True,
) -> list[Float[Tensor, " _"]]:
    """Of each latent of each seed, the share of the other seeds in which it has a match; 0 where dead.

    References:
        Sparse Autoencoders Trained on the Same Data Learn Different Features, Paulo and Belrose 2025,
        arXiv 2501.16615: about a third is shared among wide dictionaries.
    """
    _check_seeds(dictionaries, alive)
    scores = [torch.zeros(len(d), device=d.device) for d in dictionaries]
    for i, j in itertools.combinations(range(len(dictionaries)), 2):
        ids = [alive[s].nonzero().squeeze(1) for s in (i, j)]
        match, _ = mutual_matches(dictionaries[i][ids[0]], dictionaries[j][ids[1]], threshold, signed)
        found = match >= 0
        scores[i][ids[0][found]] += 1
        scores[j][ids[1][match[found]]] += 1
    return [score / (len(dictionaries) - 1) for score in scores]


def seed_stability(a: Float[Tensor, "n_a d_model"], b: Float[Tensor, "n_b d_model"]) -> float:
    """Mean of the largest cosine that a latent has with one of the other dictionary; both ways, averaged.

    1 = the same directions. It grows with the widths even for random ones: hold it against `null_cosine`.
    """
    return (mean_max_cosine(a, b) + mean_max_cosine(b, a)) / 2


def share_found_again(a: Float[Tensor, "n_a d_model"], b: Float[Tensor, "n_b d_model"]) -> float:
    """Share of the directions of two dictionaries that have a mutual match in the other, by |cos|.

    The threshold is `match_threshold` of the wider one, so a random direction counts once in a thousand.
    """
    threshold = match_threshold(max(len(a), len(b)), a.shape[1], signed=False)
    alive = [torch.ones(len(d), dtype=torch.bool, device=d.device) for d in (a, b)]
    return float(torch.cat(stability_scores([a, b], alive, threshold, signed=False)).mean())


def _nearest(a: Tensor, b: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Of each row of a, the row of b with the largest cosine, and that cosine; 0 and -1 without any."""
    place, cosine = torch.zeros(len(a), dtype=torch.int64, device=a.device), a.new_full((len(a),), -1.0)
    if len(b) == 0:
        return place - 1, cosine
    unit_b = F.normalize(b, dim=1)
    for begin in range(0, len(a), _CHUNK):
        cosines = F.normalize(a[begin : begin + _CHUNK], dim=1) @ unit_b.T
        best = (cosines if signed else cosines.abs()).max(dim=1)
        cosine[begin : begin + _CHUNK], place[begin : begin + _CHUNK] = best
    return place, cosine


def _check_shape(n: int, d_model: int) -> None:
    for name, value in (("n", n), ("d_model", d_model)):
        if value < 1:
            raise InputError(f"`{name}` must be at least 1, got {value}.")


def _check_seeds(dictionaries: Sequence[Tensor], alive: Sequence[Tensor]) -> None:
    if len(dictionaries) < 2:
        raise InputError(f"`dictionaries` must be of at least 2 seeds, got {len(dictionaries)}.")
    widths = {d.shape[1] for d in dictionaries}
    if len(widths) > 1:
        raise InputError(f"`dictionaries` must be of one d_model, got {sorted(widths)}.")
    if [len(d) for d in dictionaries] != [len(mask) for mask in alive]:
        raise InputError(
            f"`alive` must have a mask for the latents of every dictionary, got lengths"
            f" {[len(mask) for mask in alive]} for {[len(d) for d in dictionaries]}."
        )
