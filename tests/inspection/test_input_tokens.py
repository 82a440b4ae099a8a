"""Input tokens: shares, lift, intervals and entropy by hand, against a dense count, and by simulation."""

import math

import numpy as np
import pytest
import torch

from sae.errors import InputError
from sae.inspection.input_tokens import TokenCounts, wilson_interval
from sae.inspection.null import clarities


def _count(tokens, latents, vocabulary=4, batch=None, **options):
    counts = TokenCounts(latents.shape[1], vocabulary, **options)
    for some, codes in zip(
        tokens.split(batch or len(tokens)), latents.split(batch or len(tokens)), strict=True
    ):
        rows, indices = codes.nonzero(as_tuple=True)
        counts.add(some, indices, some[rows], codes[rows, indices])
    return counts


def test_share_lift_and_firings_by_hand():
    tokens = torch.tensor([0, 0, 0, 0, 0, 0, 1, 1, 2, 3])
    latents = torch.zeros(10, 2)
    latents[6, 0], latents[7, 0], latents[0, 0] = 2.0, 4.0, 2.0
    first, second = _count(tokens, latents).top(0, 5)
    assert (first.token, first.share, first.firings) == (1, pytest.approx(0.75), 2)
    assert first.lift == pytest.approx(0.75 / 0.2)
    assert second.token == 0 and second.lift == pytest.approx(0.25 / 0.6)


def test_interval_is_wilsons_at_the_effective_number_of_firings():
    tokens = torch.tensor([0] * 6 + [1] * 4)
    latents = torch.tensor([[1.0]] * 2 + [[0.0]] * 4 + [[3.0]] * 2 + [[0.0]] * 2)
    top = _count(tokens, latents).top(0, 1)[0]
    n = 8.0**2 / (1 + 1 + 9 + 9)
    share, z = 6 / 8, 1.959964
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    assert top.lift_low == pytest.approx((centre - half) / 0.4)
    assert top.lift_high == pytest.approx((centre + half) / 0.4)
    assert top.lift_low < top.lift < top.lift_high


def test_the_interval_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(0)
    for share in (0.02, 0.3, 0.9):
        weights = generator.exponential(size=(4000, 200))
        hits = generator.random((4000, 200)) < share
        seen = (weights * hits).sum(1) / weights.sum(1)
        effective = weights.sum(1) ** 2 / (weights**2).sum(1)
        pairs = zip(seen, effective, strict=True)
        low, high = np.transpose([np.concatenate(wilson_interval(s[None], float(n))) for s, n in pairs])
        assert ((low <= share) & (share <= high)).mean() == pytest.approx(0.95, abs=0.03)


def test_a_latent_that_fires_alike_everywhere_has_no_lift_and_no_clarity():
    tokens = torch.arange(4).repeat(50)
    counts = _count(tokens, torch.ones(200, 1))
    assert all(t.lift == pytest.approx(1.0) for t in counts.top(0, 4))
    assert clarities(counts)[0] == pytest.approx(0.0, abs=1e-9)
    assert counts.entropies()[0] == pytest.approx(math.log(4))


def test_a_latent_of_one_token_has_clarity_one_and_entropy_zero():
    tokens = torch.arange(4).repeat(50)
    counts = _count(tokens, (tokens == 2).float()[:, None])
    assert clarities(counts)[0] == pytest.approx(1.0) and counts.entropies()[0] == 0.0


def test_clarity_is_the_share_of_entropy_removed():
    tokens = torch.arange(4).repeat(10)
    counts = _count(tokens, (tokens < 2).float()[:, None])
    assert clarities(counts)[0] == pytest.approx(1 - math.log(2) / math.log(4))


def test_one_accident_on_a_rare_token_does_not_come_first():
    tokens = torch.cat([torch.zeros(500), torch.ones(499), torch.tensor([3])]).long()
    latents = (tokens == 1).float()[:, None]
    latents[-1] = 1.0
    assert [t.token for t in _count(tokens, latents).top(0, 2)] == [1, 3]


@pytest.mark.parametrize("batch", [7, 100, 1000])
def test_counting_in_batches_equals_a_dense_count(monkeypatch, batch):
    monkeypatch.setattr("sae.inspection.input_tokens._MERGE_ABOVE", 50)
    tokens = torch.randint(0, 30, (1000,))
    latents = torch.rand(1000, 5) * (torch.rand(1000, 5) < 0.3)
    counts = _count(tokens, latents, vocabulary=30, batch=batch)
    mass = torch.zeros(5, 30, dtype=torch.float64).index_add_(1, tokens, latents.T.double())
    p = tokens.bincount(minlength=30) / 1000
    for i in range(5):
        q = mass[i] / mass[i].sum()
        assert counts.entropies()[i] == pytest.approx(float(-(q[q > 0] * q[q > 0].log()).sum()))
        for t in counts.top(i, 30):
            assert t.share == pytest.approx(float(q[t.token]))
            assert t.lift == pytest.approx(float(q[t.token] / p[t.token]))
            assert t.firings == int((latents[tokens == t.token, i] > 0).sum())


def test_latents_of_a_token_come_by_share_times_log_lift():
    tokens = torch.arange(4).repeat(25)
    latents = torch.stack([(tokens == 1), torch.ones(100).bool(), (tokens < 2), (tokens == 3)], 1).float()
    found, scores = _count(tokens, latents).latents_of(1)
    assert found.tolist() == [0, 2, 1]
    assert scores == pytest.approx([math.log(4), 0.5 * math.log(2), 0.0])


def test_beyond_its_memory_it_keeps_the_heaviest_tokens_and_the_whole_mass(monkeypatch):
    monkeypatch.setattr("sae.inspection.input_tokens._MERGE_ABOVE", 100)
    tokens = torch.randint(0, 1000, (4000,))
    tokens[::2] = torch.randint(0, 3, (2000,))  # three frequent ones, 997 rare ones
    latents = torch.rand(4000, 2) + 0.5
    exact = _count(tokens, latents, vocabulary=1000)
    bounded = _count(tokens, latents, vocabulary=1000, batch=500, most_pairs=400)
    assert len(bounded.tensors()["indices"]) <= 400 < len(exact.tensors()["indices"])
    for i in range(2):
        frequent = {t.token: t for t in bounded.top(i, 100) if t.token < 3}
        for t in exact.top(i, 1000):
            if t.token < 3:
                assert frequent[t.token].share == pytest.approx(t.share)
                assert frequent[t.token].lift_low == pytest.approx(t.lift_low)
    assert bounded.firings() == pytest.approx(exact.firings())
    assert bounded.entropies() == pytest.approx(exact.entropies(), rel=0.04)
    assert (bounded.entropies() >= exact.entropies() - 1e-9).all()


def test_saved_and_loaded_it_says_the_same():
    tokens = torch.randint(0, 30, (500,))
    counts = _count(tokens, torch.rand(500, 3), vocabulary=30)
    again = TokenCounts.from_tensors(counts.tensors())
    assert [t.token for t in again.top(1, 30)] == [t.token for t in counts.top(1, 30)]
    assert again.entropies() == pytest.approx(counts.entropies(), rel=1e-5)


def test_latent_that_never_fired_has_no_tokens():
    counts = _count(torch.tensor([0, 1]), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
    assert counts.top(1, 3) == [] and counts.entropies()[1] == 0 and clarities(counts)[1] == 0


def test_latent_out_of_range_is_an_error():
    with pytest.raises(InputError, match="numbered 0 to 1, got 2"):
        _count(torch.tensor([0]), torch.ones(1, 2)).top(2, 1)
