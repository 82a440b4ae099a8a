"""The null is what random directions give, looked up by density."""

import math

import pytest
import torch
from torch.nn import functional as F

from sae.inspection.null import (
    DENSEST,
    LEVELS,
    PER_DENSITY,
    NullDistribution,
    RandomDetectors,
    random_output_scores,
)


def test_detectors_fire_at_their_densities_on_the_rows_they_were_set_on():
    sample = torch.randn(20_000, 12) * torch.linspace(0.1, 3, 12) + 5.0
    detectors = RandomDetectors(sample, len(sample))
    code = detectors.encode_sparse(sample)
    density = torch.bincount(code.indices, minlength=detectors.n_latents) / len(sample)
    wanted = torch.logspace(math.log10(50 / len(sample)), math.log10(DENSEST), LEVELS)
    torch.testing.assert_close(density, wanted.repeat_interleave(PER_DENSITY), atol=1e-4, rtol=0.02)
    assert (code.values > 0).all()


def test_null_scores_are_percentiles_of_the_directions_of_like_density():
    scores = torch.zeros(2 * PER_DENSITY, 4, dtype=torch.float64)
    scores[:PER_DENSITY, 0], scores[PER_DENSITY:, 0] = 0.001, 0.1
    scores[:PER_DENSITY, 1] = torch.linspace(0.5, 0.7, PER_DENSITY)
    scores[PER_DENSITY:, 1] = torch.linspace(0.1, 0.2, PER_DENSITY)
    null = NullDistribution(scores)
    rare, common = null.beside(0.002, 0.3, 1.5), null.beside(0.4, 0.3, 1.5)
    assert rare is not None and rare.clarity == pytest.approx(0.69) and rare.cosine == 0.3
    assert common is not None and common.clarity == pytest.approx(0.195) and common.logit == 1.5
    assert null.beside(0.0, 0.3, 1.5) is None


def test_random_output_scores_bound_fresh_random_directions():
    torch.manual_seed(5)  # not that of the random directions
    W_U = torch.randn(300, 20) * torch.rand(300, 1)
    cosine, logit = random_output_scores(W_U)
    fresh = F.normalize(torch.randn(2000, 20), dim=-1) @ W_U.T
    best = fresh.max(dim=1)
    assert float((best.values > logit).float().mean()) == pytest.approx(0.05, abs=0.04)
    cosines = best.values / W_U.norm(dim=-1)[best.indices]
    assert float((cosines > cosine).float().mean()) == pytest.approx(0.05, abs=0.04)
