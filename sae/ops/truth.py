"""A learned dictionary held against the features that the rows were made of."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from sae.errors import InputError
from sae.ops.geometry import mean_max_cosine
from sae.ops.metrics import ReconstructionMetrics
from sae.ops.sparse import SparseLatents

FOUND = 0.5
"""|cos| from which a matched latent counts as the feature's own, where behaviour on a tree is judged."""
RECOVERED = 0.9
"""|cos| above which a feature counts as recovered."""


class Match(NamedTuple):
    """The latent that stands for each true feature, each latent for one feature at most."""

    latent: Int[Tensor, " n_true"]
    """-1 where there is none: a dictionary narrower than the truth."""
    cosine: Float[Tensor, " n_true"]
    """|cos| of the pair; 0 where there is none."""


class TruthScores(NamedTuple):
    """Scores against the truth over all rows added; None where they have no meaning."""

    f1: float
    """Mean over the features that occur of 2 tp / (2 tp + fp + fn), each detected by its matched latent;
    unmatched and never right = 0."""
    precision: float
    """Mean of tp / (tp + fp) over the same features; 0 where the latent is silent."""
    recall: float
    """Mean of tp / (tp + fn) over the same features."""
    f1_rare: float
    """`f1` over the quarter of them with the fewest firings in the rows added."""
    f1_of_latents: float
    """Mean F1 over latents, each a detector of the feature nearest in |cos|: the published boards' number."""
    mcc: float
    """Mean |cos| of the matched pairs over ALL true features; unmatched = 0."""
    mmcs: float
    """Mean over the true features of the largest cosine with any latent."""
    uniqueness: float
    """Different features that are nearest to some latent, over the number of latents."""
    recovered: float
    """Share of all true features whose matched latent has |cos| > 0.9."""
    absorption: float | None
    """Share of the firings of children on which the child's latent fires and the parent's is silent."""
    hedging: float | None
    """Mean over (parent, child) of how much more the parent's latent leans to the child than the parent."""
    shrinkage: float | None
    """Slope of learned on true magnitudes, through zero: 1 = none, 0.9 = a tenth too small."""
    fvu: float | None
    """As in `ReconstructionScores`."""
    l0: float
    """Mean number of latents that fire per row."""
    true_l0: float
    """Mean number of true features that fire per row."""
    dead_fraction: float
    """Share of latents that fired on no row."""
    occurring: float
    """Share of the true features that fired on any row; the others have no part in F1."""


def match(truth: Float[Tensor, "n_true d_model"], learned: Float[Tensor, "n_latents d_model"]) -> Match:
    """Pairs features and latents one to one so that the sum of |cos| is largest (Hungarian method).

    References:
        The Hungarian method for the assignment problem, Kuhn 1955. scipy solves it after "On implementing 2D
        rectangular assignment algorithms", Crouse 2016.
    """
    cosines = _cosines(truth, learned).abs().cpu()
    features, latents = linear_sum_assignment(cosines.numpy(), maximize=True)
    pairs = torch.from_numpy(features), torch.from_numpy(latents)
    latent, cosine = torch.full((len(truth),), -1), torch.zeros(len(truth))
    latent[pairs[0]] = pairs[1]
    cosine[pairs[0]] = cosines[pairs]
    return Match(latent.to(truth.device), cosine.clamp_max(1.0).to(truth.device))


def mcc(truth: Float[Tensor, "n_true d_model"], learned: Float[Tensor, "n_latents d_model"]) -> float:
    """Mean |cos| of matched pairs over every true feature: with latents for half of them, 0.5 at most.

    References:
        Evaluating Sparse Autoencoders on Scalable Realistic Synthetic Data (SynthSAEBench), Chanin and
        Garriga-Alonso 2026, arXiv 2602.14687. There the mean is over min(n_true, n_latents) pairs, which
        rewards narrow dictionaries; their number is this one times n_true / min(n_true, n_latents).
    """
    return float(match(truth, learned).cosine.mean())


def hedging(
    truth: Float[Tensor, "n_true d_model"],
    learned: Float[Tensor, "n_latents d_model"],
    parents: Int[Tensor, " n_true"],
    matched: Match,
) -> float | None:
    """Mean over (parent p, child c) of sign(d · p) d · c - p · c, d being the unit latent matched to p.

    0 where each parent has a latent of its own or the errors of latents have no preferred direction;
    a / sqrt(1 + a^2) for a latent p + a c where all are orthogonal. Pairs count where |cos(d, p)| is at least
    `FOUND`; None without any.

    References:
        Feature Hedging: Correlated Features Break Narrow Sparse Autoencoders, Chanin, Dulka and
        Garriga-Alonso 2025, arXiv 2505.11756 (the effect; this measure of it is our own).
    """
    child = ((parents >= 0) & (matched.cosine[parents] >= FOUND)).nonzero().squeeze(1)
    if len(child) == 0:
        return None
    parent = parents[child]
    p, c = F.normalize(truth[parent], dim=-1), F.normalize(truth[child], dim=-1)
    d = F.normalize(learned[matched.latent[parent]].to(truth), dim=-1)
    along = (d * p).sum(1).sign() * (d * c).sum(1)
    return float((along - (p * c).sum(1)).mean())


class TruthMetrics:
    """Accumulates `TruthScores` batch by batch, on the device of the batches.

    A true feature is detected by the one latent that is matched to it by direction, so a feature that two
    latents share is found once, and features that no latent is left for count as missed. This differs from
    the published boards, where each latent is scored on its nearest feature and features without a latent
    have no part: that number is `f1_of_latents`. Features that never occur in the rows added can be neither
    found nor missed on them and have no part in F1; `occurring` says how many took part.

    Absorption is judged on the firings of child features (the parent then fires too) where parent and child
    both have a latent with |cos| >= `FOUND`: it is the share of them where the child's latent fires and the
    parent's does not, over all such firings.

    References:
        A is for Absorption, Chanin et al. 2024, arXiv 2409.14507 (the effect; there it is found with
        probes, here the tree is known).
    """

    def __init__(
        self,
        directions: Float[Tensor, "n_latents _"],
        features: Float[Tensor, "n_true d_model"],
        parents: Int[Tensor, " _"] | None = None,
    ) -> None:
        """Matches latents and features, which takes seconds to minutes from 10,000 of each on.

        Args:
            directions: of the latents.
            features: directions of the true features, on the same device.
            parents: parent of each true feature, -1 for none; None = there are no trees.

        Raises:
            InputError: if widths or numbers do not fit.
        """
        n_true = len(features)
        if directions.shape[1] != features.shape[1]:
            raise InputError(
                f"`directions` must have d_model={features.shape[1]} columns as `features` has, got"
                f" {directions.shape[1]}; they are not of one world."
            )
        if parents is not None and len(parents) != n_true:
            raise InputError(f"`parents` must name {n_true} features, got {len(parents)}.")
        device = features.device
        parents = torch.full((n_true,), -1) if parents is None else parents
        self._parents = parents.to(device)
        self.match = match(features, directions)
        self._nearest = _nearest(features, directions)
        self._of_directions = {
            "mcc": float(self.match.cosine.mean()),
            "mmcs": mean_max_cosine(features, directions),
            "uniqueness": len(self._nearest.unique()) / len(directions),
            "recovered": float((self.match.cosine > RECOVERED).float().mean()),
            "hedging": hedging(features, directions, self._parents, self.match),
        }
        has = self.match.latent >= 0
        self._feature = torch.full((len(directions),), -1, device=device)
        self._feature[self.match.latent[has]] = has.nonzero().squeeze(1)
        signs = (features[has] * directions[self.match.latent[has]].to(features)).sum(1).sign()
        self._sign = torch.ones(n_true, device=device, dtype=torch.float64)
        self._sign[has] = signs.double()
        self._found = self.match.cosine >= FOUND
        self._reconstruction = ReconstructionMetrics(len(directions), features.new_zeros(features.shape[1]))
        self._true, self._right = (torch.zeros(n_true, dtype=torch.int64, device=device) for _ in range(2))
        self._fired, self._right_of_latent = (
            torch.zeros(len(directions), dtype=torch.int64, device=device) for _ in range(2)
        )
        self._products = torch.zeros(2, dtype=torch.float64, device=device)
        self._absorbed = torch.zeros(2, dtype=torch.int64, device=device)
        self._rows = 0

    def add(
        self,
        x: Float[Tensor, "rows d_model"],
        x_hat: Float[Tensor, "rows d_model"],
        latents: SparseLatents,
        truth: SparseLatents,
    ) -> None:
        """Adds a batch.

        Args:
            x: the rows.
            x_hat: their reconstructions.
            latents: the learned codes; entries equal to zero do not count as firing.
            truth: the codes that the rows were made of.
        """
        self._reconstruction.add(x, x_hat, latents, None)
        self._rows += len(x)
        latents, truth = latents.without_zeros(), truth.without_zeros()
        n_true = len(self._true)
        true_keys, order = (truth.rows * n_true + truth.indices).sort()
        self._true += torch.bincount(truth.indices, minlength=n_true)
        self._fired += torch.bincount(latents.indices, minlength=len(self._fired))
        right, _ = _look_up(latents.rows * n_true + self._nearest[latents.indices], true_keys)
        self._right_of_latent += torch.bincount(latents.indices[right], minlength=len(self._fired))
        feature = self._feature[latents.indices]
        is_matched = feature >= 0
        feature, values = feature[is_matched], latents.values[is_matched]
        keys = latents.rows[is_matched] * n_true + feature
        right, at = _look_up(keys, true_keys)
        self._right += torch.bincount(feature[right], minlength=n_true)
        self._add_magnitudes(feature[right], values[right], truth.values[order][at[right]])
        self._add_absorption(truth, keys.sort().values)

    def _add_magnitudes(self, feature: Tensor, learned: Tensor, true: Tensor) -> None:
        found = self._found[feature]
        learned, true = learned[found].double() * self._sign[feature[found]], true[found].double()
        self._products += torch.stack([(learned * true).sum(), true.square().sum()])

    def _add_absorption(self, truth: SparseLatents, keys: Tensor) -> None:
        parent = self._parents[truth.indices]
        judged = (parent >= 0) & self._found[truth.indices] & self._found[parent]
        at = truth.rows[judged] * len(self._true)
        child_fires, _ = _look_up(at + truth.indices[judged], keys)
        parent_fires, _ = _look_up(at + parent[judged], keys)
        self._absorbed += torch.stack([(child_fires & ~parent_fires).sum(), judged.sum()])

    def compute(self) -> TruthScores:
        """The scores of everything added so far.

        Raises:
            InputError: if no row was added, or no true feature fired on any.
        """
        reconstruction = self._reconstruction.compute()
        occurs = self._true > 0
        if not occurs.any():
            raise InputError("`truth` must fire on some row; add more rows.")
        padded = torch.cat([self._fired, self._fired.new_zeros(1)])  # latent -1: none
        fired = padded[self.match.latent][occurs].double()
        true, right = self._true[occurs].double(), self._right[occurs].double()
        f1 = 2 * right / (fired + true)
        rare = true.argsort(stable=True)[: -(-len(true) // 4)]
        near = self._true[self._nearest].double()
        of_latents = 2 * self._right_of_latent.double() / (self._fired.double() + near).clamp_min(1.0)
        absorbed, judged = self._absorbed.tolist()
        product, square = self._products.tolist()
        return TruthScores(
            f1=float(f1.mean()),
            precision=float((right / fired.clamp_min(1.0)).mean()),
            recall=float((right / true).mean()),
            f1_rare=float(f1[rare].mean()),
            f1_of_latents=float(of_latents.mean()),
            absorption=absorbed / judged if judged else None,
            shrinkage=product / square if square > 0 else None,
            fvu=reconstruction.fvu,
            l0=reconstruction.l0,
            true_l0=float(self._true.sum()) / self._rows,
            dead_fraction=reconstruction.dead_fraction,
            occurring=float(occurs.double().mean()),
            **self._of_directions,
        )


def between(x: float | None, chance: float | None, truth: float | None) -> float | None:
    """(x - chance) / (truth - chance): 0 = no better than chance, 1 = as good as the truth.

    None where a score has no meaning, or chance is as good as the truth.
    """
    if x is None or chance is None or truth is None or truth == chance:
        return None
    return (x - chance) / (truth - chance)


def _cosines(truth: Tensor, learned: Tensor) -> Tensor:
    return F.normalize(truth, dim=-1) @ F.normalize(learned.to(truth), dim=-1).T


def _nearest(truth: Tensor, learned: Tensor) -> Tensor:
    """Of each latent, the feature with the largest |cos|."""
    return _cosines(learned.to(truth), truth).abs().argmax(dim=1)


def _look_up(keys: Tensor, sorted_keys: Tensor) -> tuple[Tensor, Tensor]:
    """Which keys are among the sorted ones, and where."""
    if len(sorted_keys) == 0:
        return torch.zeros_like(keys, dtype=torch.bool), torch.zeros_like(keys)
    at = torch.searchsorted(sorted_keys, keys).clamp_max(len(sorted_keys) - 1)
    return sorted_keys[at] == keys, at
