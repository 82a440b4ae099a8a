"""resid.L equals transformers' hidden_states[L], for every family, and nothing after it is run."""

import pytest
import torch
import transformers
from torch import nn

from sae.activations.hookpoints import hookpoint_names, residuals
from sae.activations.language_model import find_blocks
from sae.errors import InputError


@pytest.fixture
def ids():
    return torch.randint(4, 50, (2, 9))


def test_residuals_equal_hidden_states_up_to_the_last_block(family_model, ids):
    names = hookpoint_names(family_model)
    assert names == ["resid.0", "resid.1", "resid.2", "resid.3"]
    with torch.no_grad():
        reference = family_model(input_ids=ids, output_hidden_states=True).hidden_states
    found = residuals(family_model, ids, names)
    for depth, name in enumerate(names[:-1]):
        torch.testing.assert_close(found[name], reference[depth], msg=name)


def test_last_residual_is_the_last_blocks_output_before_the_final_norm(family_model, ids):
    outputs = []
    handle = find_blocks(family_model)[1][-1].register_forward_hook(
        lambda _m, _a, out: outputs.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        family_model(input_ids=ids)
    handle.remove()
    torch.testing.assert_close(residuals(family_model, ids, ["resid.3"])["resid.3"], outputs[0])


def test_blocks_after_the_last_hookpoint_are_not_run_and_no_hook_stays(family_model, ids):
    calls = []
    handles = [
        b.register_forward_hook(lambda *_, i=i: calls.append(i))
        for i, b in enumerate(find_blocks(family_model)[1])
    ]
    residuals(family_model, ids, ["resid.0", "resid.2"])
    assert calls == [0, 1]
    for handle in handles:
        handle.remove()
    left = [m for m in family_model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert left == []


def test_hooks_are_removed_after_an_error(family_model):
    with pytest.raises(IndexError):
        residuals(family_model, torch.full((1, 3), 999), ["resid.1"])
    assert [m for m in family_model.modules() if isinstance(m, nn.Module) and m._forward_hooks] == []


def test_missing_hookpoint_is_an_error_that_lists_those_there_are(family_model, ids):
    with pytest.raises(InputError, match=r"has no resid.9; it has resid.0, resid.1, resid.2, resid.3"):
        residuals(family_model, ids, ["resid.1", "resid.9"])


def test_a_hookpoint_named_twice_is_an_error(family_model, ids):
    with pytest.raises(InputError, match="each hookpoint once"):
        residuals(family_model, ids, ["resid.1", "resid.1"])


def test_encoder_decoder_is_an_error():
    config = transformers.T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2)
    with pytest.raises(InputError, match="encoder-decoder"):
        find_blocks(transformers.T5ForConditionalGeneration(config))
