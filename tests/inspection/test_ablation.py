"""Ablations equal a direct computation with the splice, latent by latent."""

import pytest
import torch
from torch.nn import functional as F

import sae
from sae.activations.hookpoints import residuals, visiting
from sae.activations.language_model import load_language_model
from sae.inspection.ablation import _subtraction, measure_ablations


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


def test_only_cached_positions_are_changed(tiny_model):
    """A latent that fires everywhere is removed where rows are cached, and the rest keeps its bits."""
    model = load_language_model(str(tiny_model)).model
    dictionary = sae.TopK(16, 40, 40).requires_grad_(False)
    dictionary.b_enc.fill_(10.0)
    ids = torch.randint(0, 50, (3, 12), dtype=torch.int32)
    cached = torch.rand(ids.shape) < 0.6
    cached[:, 0], cached[:, -1] = False, True
    found = measure_ablations(model, "resid.2", dictionary, ids, {7: [(s, 11) for s in range(3)]}, cached)[7]

    def remove(x):
        z = dictionary.encode(x)[..., 7:8]
        assert (z > 0).all()
        return torch.where(cached[..., None], x - z * dictionary.directions[7], x)

    with torch.no_grad():
        clean = model(input_ids=ids).logits[:, -1].log_softmax(-1)
        with visiting(model, "resid.2", remove):
            changed = model(input_ids=ids).logits[:, -1].log_softmax(-1)
    kl = F.kl_div(changed, clean, log_target=True, reduction="none").sum(-1).mean()
    assert found.kl == pytest.approx(float(kl), rel=1e-3) and found.positions == 3
    x = residuals(model, ids, ["resid.2"])["resid.2"]
    latents = torch.full((3,), 7)
    new = _subtraction(dictionary, latents, dictionary.directions[latents], cached)(x)
    torch.testing.assert_close(new, remove(x))
    assert torch.equal(new[~cached], x[~cached]) and not torch.isclose(new[cached], x[cached]).all(-1).any()


def test_tokens_where_the_latent_does_not_fire_keep_their_bits():
    """Also where the dictionary computes in a shorter dtype than the model."""
    dictionary = sae.TopK(16, 40, 5).requires_grad_(False).bfloat16()
    x = torch.randn(2, 12, 16)
    code = dictionary.encode(x.bfloat16())
    latents = torch.tensor([3, 8])
    remove = dictionary.directions[latents]
    new = _subtraction(dictionary, latents, remove, None)(x)
    fires = torch.stack([code[i, :, latent] > 0 for i, latent in enumerate(latents.tolist())])
    assert fires.any() and torch.equal(new[~fires], x[~fires]) and not torch.equal(new[fires], x[fires])


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
