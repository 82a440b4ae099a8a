"""Input tokens: shares, lift and clarity by hand, and against a dense count."""

import math

import numpy as np
import pytest
import torch

import sae
from sae.errors import InputError
from sae.inspection.input_tokens import InputTokens


def _gather(tokens, latents, vocabulary=4):
    gathered = InputTokens(latents.shape[1], vocabulary)
    rows, indices = latents.nonzero(as_tuple=True)
    gathered.add(tokens, tokens[rows], indices, latents[rows, indices])
    return gathered


def test_share_lift_and_firings_by_hand():
    tokens = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 2, 3])
    latents = torch.zeros(10, 2)
    latents[6, 0], latents[7, 0], latents[0, 0] = 2.0, 4.0, 2.0
    top = _gather(tokens, latents).top(0, 5)
    assert [t.token for t in top] == [1, 0]
    assert (
        top[0].share == pytest.approx(0.75)
        and top[0].lift == pytest.approx(0.75 / 0.2)
        and top[0].firings == 2
    )
    assert top[1].lift == pytest.approx(0.25 / 0.6)


def test_a_latent_that_fires_alike_everywhere_has_no_lift_and_no_clarity():
    tokens = torch.arange(4).repeat(50)
    gathered = _gather(tokens, torch.ones(200, 1))
    assert all(t.lift == pytest.approx(1.0) for t in gathered.top(0, 4))
    assert gathered.summary(0).clarity == pytest.approx(0.0, abs=1e-9)
    assert gathered.summary(0).density == 1.0


def test_a_latent_of_one_token_has_clarity_one():
    tokens = torch.arange(4).repeat(50)
    gathered = _gather(tokens, (tokens == 2).float()[:, None] * 3.0)
    summary = gathered.summary(0)
    assert (summary.clarity, summary.firings, summary.mean) == (1.0, 50, 3.0)


def test_one_accident_on_a_rare_token_does_not_come_first():
    tokens = torch.tensor([0] * 700 + [1] * 299 + [3])
    latents = torch.zeros(1000, 1)
    latents[720:] = 1.0
    top = _gather(tokens, latents).top(0, 2)
    assert top[1].lift > top[0].lift and top[0].token == 1


def test_gathering_in_batches_equals_a_dense_count(monkeypatch):
    monkeypatch.setattr("sae.inspection.input_tokens._MERGE_ABOVE", 100)
    torch.manual_seed(0)
    dictionary = sae.TopK(6, 12, 3)
    x, tokens = torch.randn(500, 6), torch.randint(0, 9, (500,))
    gathered = InputTokens.gather(dictionary, zip(x.split(64), tokens.split(64), strict=True), vocabulary=9)
    dense = dictionary.encode(x).detach()
    for latent in range(12):
        mass = np.array([dense[tokens == t, latent].sum().item() for t in range(9)])
        for found in gathered.top(latent, 9):
            share = mass[found.token] / mass.sum()
            assert found.share == pytest.approx(share, rel=1e-4)
            assert found.lift == pytest.approx(
                share / (tokens == found.token).float().mean().item(), rel=1e-4
            )
        assert gathered.summary(latent).firings == int((dense[:, latent] > 0).sum())


def test_latent_that_never_fired_has_no_tokens():
    gathered = _gather(torch.tensor([0, 1]), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    assert gathered.top(1, 5) == [] and gathered.summary(1).firings == 0


def test_latent_out_of_range_is_an_error():
    with pytest.raises(InputError, match=r"`latent` must be in \[0, 1\], got 2"):
        _gather(torch.tensor([0]), torch.ones(1, 2)).top(2, 1)


def test_clarity_is_the_share_of_entropy_removed():
    tokens = torch.arange(4).repeat(10)
    gathered = _gather(tokens, (tokens < 2).float()[:, None])
    assert gathered.summary(0).clarity == pytest.approx(1 - math.log(2) / math.log(4))
