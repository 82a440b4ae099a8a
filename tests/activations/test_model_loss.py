"""Cross entropy and KL of a changed model, against transformers' own loss and torch's KL."""

import pytest
import torch
from torch.nn import functional as F

import sae
from sae.activations.hookpoints import residuals, visiting
from sae.activations.language_model import load_language_model
from sae.activations.model_loss import model_losses
from sae.errors import InputError


@pytest.fixture
def model(tiny_model):
    return load_language_model(str(tiny_model)).model


@pytest.fixture
def ids():
    return torch.randint(0, 50, (6, 12))


def test_cross_entropy_is_transformers_loss(model, ids):
    clean, losses = model_losses(model, "resid.2", ids, {"same": lambda x: x})
    with torch.no_grad():
        assert clean == pytest.approx(float(model(input_ids=ids, labels=ids).loss), rel=1e-6)
    assert losses["same"].ce == clean and losses["same"].ce_increase == 0 and losses["same"].kl == 0


def test_spliced_loss_and_kl_against_a_direct_computation(model, ids, monkeypatch):
    dictionary = sae.TopK(16, 40, 3)
    monkeypatch.setattr("sae.activations.model_loss.LOGITS_AT_ONCE", 257 * 12 * 2)  # several batches
    clean, losses = model_losses(model, "resid.2", ids, {"sae": lambda x: dictionary(x).x_hat})
    with torch.no_grad():
        p = F.log_softmax(model(input_ids=ids).logits[:, :-1], -1)
        with sae.splice(model, "resid.2", dictionary):
            q = F.log_softmax(model(input_ids=ids).logits[:, :-1], -1)
            spliced = float(model(input_ids=ids, labels=ids).loss)
    kl = F.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean()
    found = losses["sae"]
    assert found.ce == pytest.approx(spliced, rel=1e-5)
    assert found.ce_increase == pytest.approx(spliced - clean, rel=1e-3)
    assert found.kl == pytest.approx(float(kl), rel=1e-4) and found.kl > 0


def test_standard_error_is_that_of_the_differences_between_contexts(model, ids):
    replacement = torch.zeros_like
    _, together = model_losses(model, "resid.1", ids, {"zero": replacement})
    each = [model_losses(model, "resid.1", row[None], {"zero": replacement})[1]["zero"] for row in ids]
    increases = torch.tensor([loss.ce_increase for loss in each], dtype=torch.float64)
    assert together["zero"].ce_increase_se == pytest.approx(float(increases.std() / len(ids) ** 0.5))
    assert each[0].ce_increase_se is None


@pytest.fixture
def cached(ids):
    cached = torch.rand(ids.shape) < 0.7
    cached[:, 0] = False
    cached[2] = False  # a batch without a row to act on
    return cached


def test_replacements_act_on_cached_positions_only(model, ids, cached, monkeypatch):
    """Against a hook of our own; what they would do elsewhere changes nothing, not even not-a-number."""
    monkeypatch.setattr("sae.activations.model_loss.LOGITS_AT_ONCE", 257 * 12)  # one context at a time
    x = residuals(model, ids, ["resid.2"])["resid.2"]
    elsewhere = {tuple(row.tolist()) for row in x[~cached]}

    def halve(rows):
        poisoned = torch.tensor([tuple(row.tolist()) in elsewhere for row in rows])
        return torch.where(poisoned[:, None], torch.nan, rows / 2)

    clean, losses = model_losses(model, "resid.2", ids, {"half": halve}, cached)
    with torch.no_grad():
        with visiting(model, "resid.2", lambda x: torch.where(cached[..., None], x / 2, x)):
            changed = float(model(input_ids=ids, labels=ids).loss)
        assert clean == pytest.approx(float(model(input_ids=ids, labels=ids).loss), rel=1e-6)
    assert losses["half"].ce == pytest.approx(changed, rel=1e-5) and losses["half"].kl > 0


def test_where_nothing_is_cached_nothing_changes_and_where_all_is_the_mask_says_nothing(model, ids):
    zero = {"zero": torch.zeros_like}
    nowhere = model_losses(model, "resid.1", ids, zero, torch.zeros(ids.shape, dtype=torch.bool))[1]["zero"]
    assert nowhere.ce_increase == 0 and nowhere.kl == 0
    everywhere = model_losses(model, "resid.1", ids, zero, torch.ones(ids.shape, dtype=torch.bool))
    assert everywhere == model_losses(model, "resid.1", ids, zero)


def test_models_without_a_causal_head_and_empty_text_are_refused(family_model, ids):
    if hasattr(family_model, "lm_head") or hasattr(family_model, "embed_out"):
        with pytest.raises(InputError, match="nothing to predict"):
            model_losses(family_model, "resid.1", ids[:, :1], {})
    else:
        with pytest.raises(InputError, match="no causal head"):
            model_losses(family_model, "resid.1", ids, {})
