"""Ablations equal a direct computation with the splice, latent by latent."""

import pytest
import torch
from torch.nn import functional as F

import sae
from sae.activations.language_model import load_language_model
from sae.inspection.ablation import measure_ablations


@pytest.mark.parametrize("logits_at_once", [1, 2**26])
def test_ablation_is_what_the_splice_computes(tiny_model, monkeypatch, logits_at_once):
    monkeypatch.setattr("sae.inspection.ablation.LOGITS_AT_ONCE", logits_at_once)
    model = load_language_model(str(tiny_model)).model
    dictionary = sae.TopK(16, 40, 5).requires_grad_(False)
    ids = torch.randint(0, 50, (4, 12))
    with sae.splice(model, "resid.2", dictionary) as s, torch.no_grad():
        model(input_ids=ids)
    fired = (s.latents > 0).nonzero()
    jobs = {}
    for sequence, position, latent in fired[::17].tolist():
        jobs.setdefault(latent, []).append((sequence, position))
    found = measure_ablations(model, "resid.2", dictionary, ids, jobs | {39: []})
    assert set(found) == set(jobs)
    with torch.no_grad():
        clean = model(input_ids=ids).logits
        for latent, places in jobs.items():
            with sae.splice(model, "resid.2", dictionary, keep_error=True, scale={latent: 0.0}):
                ablated = model(input_ids=ids).logits
            rows = tuple(torch.tensor(places).T)
            change = (clean - ablated)[rows]
            change = (change - change.mean(-1, keepdim=True)).mean(0)
            kl = F.kl_div(
                ablated[rows].log_softmax(-1), clean[rows].log_softmax(-1), log_target=True, reduction="none"
            )
            result = found[latent]
            assert result.positions == len(places)
            assert result.kl == pytest.approx(float(kl.sum(-1).mean()), rel=1e-3, abs=1e-6)
            assert [v for _, v in result.raised] == pytest.approx(change.topk(10).values.tolist(), abs=1e-4)
            assert [v for _, v in result.lowered] == pytest.approx(
                (-(-change).topk(10).values).tolist(), abs=1e-4
            )
            assert result.random_kl > 0 and result.random_change > 0


def test_the_null_of_a_latent_does_not_depend_on_what_is_measured_with_it(tiny_model):
    model = load_language_model(str(tiny_model)).model
    dictionary = sae.TopK(16, 40, 5).requires_grad_(False)
    ids = torch.randint(0, 50, (4, 12))
    with sae.splice(model, "resid.2", dictionary) as s, torch.no_grad():
        model(input_ids=ids)
    jobs = {latent: [(q, p)] for q, p, latent in (s.latents > 0).nonzero()[::7].tolist()}
    together = measure_ablations(model, "resid.2", dictionary, ids, jobs)
    for latent, places in jobs.items():
        alone = measure_ablations(model, "resid.2", dictionary, ids, {latent: places})[latent]
        assert alone.random_kl == pytest.approx(together[latent].random_kl, rel=1e-3)
        assert alone.random_change == pytest.approx(together[latent].random_change, rel=1e-3)
