"""Cross entropy of a run whose cache lacks rows: the residual stream passes where there are none."""

from types import SimpleNamespace
from unittest.mock import Mock

import lightning
import pytest
import torch
from torch.nn import functional as F

import sae
from sae.activations.contexts import held_out_cached, held_out_token_ids
from sae.activations.hookpoints import visiting
from sae.activations.language_model import language_model_of
from sae.callbacks import SplicedLoss
from sae.training import SparseAutoencoderModule


@pytest.mark.parametrize("most_tokens", [131_072, 320])
def test_positions_without_a_row_keep_the_residual_stream(without_first, monkeypatch, most_tokens):
    monkeypatch.setattr("sae.callbacks.spliced_loss.MOST_TOKENS", most_tokens)
    dictionary = sae.TopK(16, 40, 5).requires_grad_(False)
    moments = without_first.moments("resid.1")
    data = SimpleNamespace(cache=without_first, hookpoint="resid.1", moments=moments)
    trainer = Mock(spec=lightning.Trainer, datamodule=data, callbacks=[])
    module = Mock(
        spec=SparseAutoencoderModule, dictionaries={"dictionary": dictionary}, device=torch.device("cpu")
    )
    callback = SplicedLoss()
    callback.on_test_end(trainer, module)
    found = callback.metrics()

    model = language_model_of(without_first.manifest).model
    n = most_tokens // 32
    ids, cached = held_out_token_ids(without_first)[:n].long(), held_out_cached(without_first)[:n, :, None]
    mean = moments.mean.float()

    def loss(replacement):
        with torch.no_grad(), visiting(model, "resid.1", lambda x: torch.where(cached, replacement(x), x)):
            logits = model(input_ids=ids).logits[:, :-1]
        return float(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))

    assert found["ce_tokens"] == ids.numel()
    assert found["ce_clean"] == pytest.approx(loss(lambda x: x), abs=1e-5)
    assert found["ce_spliced"] == pytest.approx(loss(lambda x: dictionary(x).x_hat), abs=1e-5)
    assert found["ce_mean_ablated"] == pytest.approx(loss(lambda x: mean.expand_as(x)), abs=1e-5)
