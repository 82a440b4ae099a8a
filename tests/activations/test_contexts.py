"""Whole contexts come back from shuffled shards exactly as the model computed them."""

import json
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae.activations import ActivationCache, harvest
from sae.activations.contexts import held_out_token_ids, token_ids_of, whole_contexts
from sae.activations.hookpoints import residuals
from sae.activations.imported import import_rows
from sae.activations.language_model import load_language_model
from sae.errors import InputError


@pytest.fixture(scope="module")
def several_shards(tmp_path_factory, tiny_source):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["sae.activations.harvest"], "SHARD_BYTES", 32 * 40 * 136)
        return harvest(tiny_source, tmp_path_factory.mktemp("several") / "cache")


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("tokens_at_once", [1, 100, 8192])
def test_contexts_are_what_the_model_computes(several_shards, tiny_source, split, tokens_at_once):
    assert len(several_shards.shards("train")) > 2
    model = load_language_model(tiny_source.model).model
    seen = []
    for batch in whole_contexts(several_shards, split, "resid.3", tokens_at_once):
        expected = residuals(model, batch.token_ids, ["resid.3"])["resid.3"]
        torch.testing.assert_close(batch.x, expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(batch.token_ids, token_ids_of(several_shards)[batch.sequence])
        seen += batch.sequence.tolist()
    n_train = several_shards.manifest["splits"]["train"]["sequences"]
    everything = range(n_train) if split == "train" else range(n_train, len(token_ids_of(several_shards)))
    assert sorted(seen) == list(everything)


def test_held_out_tokens_are_those_of_the_held_out_rows(tiny_cache):
    batches = list(whole_contexts(tiny_cache, "held_out", "resid.1"))
    assert torch.equal(torch.cat([b.token_ids for b in batches]), held_out_token_ids(tiny_cache))


def test_imported_rows_have_no_contexts(tmp_path):
    cache = import_rows(torch.randn(100, 8), tmp_path / "rows")
    with pytest.raises(InputError, match="holds no token ids"):
        next(whole_contexts(cache, "train", "acts"))


@pytest.mark.parametrize(
    ("damage", "match"),
    [(lambda order: order[:-1], "orders"), (lambda order: order.roll(1).clamp(min=5), "whole contexts")],
)
def test_an_order_file_that_disagrees_is_an_error(tmp_path, tiny_source, damage, match):
    folder = harvest(tiny_source, tmp_path / "cache").folder
    order = load_file(folder / "order.safetensors")["order"]
    save_file({"order": damage(order).contiguous()}, folder / "order.safetensors")
    manifest = (folder / "manifest.json").read_text()
    size = (folder / "order.safetensors").stat().st_size
    entry = next(f for f in json.loads(manifest)["files"] if f["file"] == "order.safetensors")
    (folder / "manifest.json").write_text(manifest.replace(f'"bytes": {entry["bytes"]}', f'"bytes": {size}'))
    with pytest.raises(InputError, match=match):
        list(whole_contexts(ActivationCache(folder), "train", "resid.1"))
