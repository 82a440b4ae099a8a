"""What chance gives: random directions made to fire as often as latents do, scored as latents are."""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from sae.inspection.input_tokens import TokenCounts
from sae.inspection.latent import FEWEST_FIRINGS, NullScores
from sae.ops.sparse import SparseLatents, from_dense

DENSEST = 0.2
"""The largest share of rows that random directions are made to fire on; denser latents are set beside it."""
LEVELS = 8
"""Densities, in equal ratios, from that of a latent that fires just often enough to be called clear."""
PER_DENSITY = 48
PERCENTILE = 95.0


class RandomDetectors:
    """Random directions, isotropic, each firing above a threshold that gives it a set density.

    latents = relu((x - mean) . direction - threshold). The thresholds are quantiles of a sample of rows,
    so the densities that result differ from those aimed at, most of all the lowest: they are counted,
    and scores are looked up by what was counted.
    """

    def __init__(self, sample: Float[Tensor, "rows d_model"], rows: int, seed: int = 0) -> None:
        """Draws directions and sets their thresholds.

        Args:
            sample: rows that thresholds are set on.
            rows: all rows to come; the sparsest directions fire on about `FEWEST_FIRINGS` of them.
            seed: of the directions.
        """
        generator = torch.Generator().manual_seed(seed)
        sparsest = min(FEWEST_FIRINGS / rows, DENSEST)
        density = torch.logspace(math.log10(sparsest), math.log10(DENSEST), LEVELS, dtype=torch.float64)
        density = density.repeat_interleave(PER_DENSITY)
        directions = torch.randn(len(density), sample.shape[1], generator=generator)
        self.directions = F.normalize(directions, dim=-1).to(sample.device, sample.dtype)
        self._mean = sample.mean(0)
        projected = ((sample - self._mean) @ self.directions.T).sort(dim=0, descending=True).values
        place = (density * len(sample)).round().long().clamp(1, len(sample) - 1).to(sample.device)
        self._threshold = projected.gather(0, place[None]).squeeze(0)

    @property
    def n_latents(self) -> int:
        """Number of random directions."""
        return len(self.directions)

    def encode_sparse(self, x: Float[Tensor, "rows d_model"]) -> SparseLatents:
        """Their activations."""
        return from_dense(((x - self._mean) @ self.directions.T - self._threshold).relu())


class NullDistribution:
    """Percentiles of the random directions' scores, looked up by density."""

    def __init__(self, scores: Float[Tensor, "detectors scores"]) -> None:
        """Takes what `null_scores` gave."""
        self._scores = scores.numpy()

    def beside(self, density: float, cosine: float, logit: float) -> NullScores | None:
        """The null scores for a latent of this density: those of the random directions nearest to it.

        Args:
            density: the latent's; None is given for 0.
            cosine: the null cosine with output tokens, which does not depend on density,
            logit: and the null logit.
        """
        if density <= 0 or not len(self._scores):
            return None
        distance = np.abs(np.log(self._scores[:, 0] / density))
        nearest = np.argsort(distance, kind="stable")[:PER_DENSITY]
        of_inputs = np.percentile(self._scores[nearest, 1:], PERCENTILE, axis=0)
        return NullScores(*(float(score) for score in of_inputs), cosine=cosine, logit=logit)


def null_scores(inputs: TokenCounts, previous: TokenCounts) -> Float[Tensor, "detectors scores"]:
    """Density, clarity, share of the top token and of the top previous token, of those that fired."""
    density, clarity = inputs.firings() / inputs.text.sum(), clarities(inputs)
    scores = []
    for i in density.nonzero()[0]:
        before = previous.top(int(i), 1)
        share = before[0].share if before else 0.0
        scores.append((density[i], clarity[i], inputs.top(int(i), 1)[0].share, share))
    return torch.tensor(scores, dtype=torch.float64).reshape(-1, 4)


def clarities(counts: TokenCounts) -> Float[np.ndarray, " n_latents"]:
    """1 - H(q) / H(p) of every latent; 0 where it never fired."""
    text = max(counts.text_entropy(), 1e-12)
    return np.where(counts.firings() > 0, 1.0 - counts.entropies() / text, 0.0)


def random_output_scores(
    W_U: Float[Tensor, "vocabulary d_model"], n: int = 256, seed: int = 0
) -> tuple[float, float]:
    """The 95th percentile, over random directions, of the top output token's cosine and logit."""
    generator = torch.Generator().manual_seed(seed)
    directions = F.normalize(torch.randn(n, W_U.shape[1], generator=generator), dim=-1).to(W_U)
    logits = directions @ W_U.T
    best = logits.max(dim=1)
    cosines = best.values / W_U[best.indices].norm(dim=-1).clamp_min(torch.finfo(W_U.dtype).tiny)
    cosine, logit = (float(torch.quantile(s.float(), PERCENTILE / 100)) for s in (cosines, best.values))
    return cosine, logit
