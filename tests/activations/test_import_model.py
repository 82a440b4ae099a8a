"""Imported activations are those of the language model that is named with them, or refused."""

from __future__ import annotations

import pytest
import torch

from sae.activations import import_activations
from sae.activations.hookpoints import residuals
from sae.activations.language_model import language_model_of, load_language_model
from sae.errors import InputError

N, D = 3000, 6
pytestmark = pytest.mark.usefixtures("small_shards")


@pytest.fixture
def of_model(tiny_model, tiny_cache):
    ids = tiny_cache.token_ids[:40]
    found = residuals(load_language_model(str(tiny_model)).model, ids, ["resid.1"])
    return ids, found["resid.1"], str(tiny_model)


def test_latents_can_be_read_with_the_model_of_the_activations(of_model, tmp_path):
    from sae.activations.contexts import whole_contexts

    ids, x, model = of_model
    cache = import_activations({"resid.1": x}, tmp_path / "cache", token_ids=ids, model=model)
    assert language_model_of(cache.manifest).name == model
    for batch in whole_contexts(cache, "held_out", "resid.1"):
        assert torch.equal(batch.x, x[batch.sequence.long()])
        assert torch.equal(batch.token_ids, ids[batch.sequence.long()].long())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda a: a | {"activations": {"resid.2": a["x"]}},
            "not what .* has at resid.2.*nearest is resid.1",
        ),
        (lambda a: a | {"token_ids": a["token_ids"].roll(1, 1)}, "not what .* has at resid.1"),
        (lambda a: a | {"token_ids": None}, "`model` needs `token_ids`"),
        (lambda a: a | {"token_ids": a["token_ids"] + 300}, "has 257 tokens"),
        (lambda a: a | {"activations": {"acts": a["x"]}}, "has no acts; it has resid.0"),
        (lambda a: a | {"activations": {"resid.1": a["x"][..., :5]}}, "d_model=16, the activations have 5"),
        (lambda a: a | {"model": "nowhere/at-all"}, "could not be loaded"),
    ],
)
def test_activations_that_are_not_the_models_are_refused(of_model, tmp_path, change, match):
    ids, x, model = of_model
    arguments = change({"activations": {"resid.1": x}, "x": x, "token_ids": ids, "model": model})
    del arguments["x"]
    with pytest.raises(InputError, match=match):
        import_activations(location=tmp_path / "cache", **arguments)
    assert not (tmp_path / "cache").exists()


def test_a_model_with_sequences_of_several_lengths_is_refused(of_model, tmp_path):
    ids, x, model = of_model
    with pytest.raises(InputError, match="sequences of one length, got 30 to 32"):
        import_activations(
            {"resid.1": x.flatten(0, 1)[:-2]},
            tmp_path / "cache",
            token_ids=ids.flatten()[:-2],
            context_length=32,
            model=model,
        )


def test_activations_of_a_longer_context_than_the_model_has_are_refused(tiny_model, tmp_path):
    x, ids = torch.randn(10, 65, 16), torch.zeros(10, 65, dtype=torch.int64)
    with pytest.raises(InputError, match="cannot run sequences of 65 tokens"):
        import_activations(
            {"resid.1": x}, tmp_path / "cache", token_ids=ids, model=str(tiny_model), held_out=0.5
        )
