"""resid.L equals transformers' hidden_states[L], for every family, and nothing after it is run."""

import pytest
import torch
import transformers
from torch import nn

from sae.activations.hookpoints import hookpoint_names, residuals
from sae.activations.language_model import find_blocks
from sae.errors import InputError

SMALL = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}
GATED = SMALL | {"intermediate_size": 32, "num_key_value_heads": 1, "head_dim": 8}
FAMILIES = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0)
    ),
    "gpt_neox": lambda: transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(**SMALL, intermediate_size=32, bos_token_id=0, eos_token_id=0)
    ),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GATED)),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(transformers.Gemma2Config(**GATED)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            **SMALL, intermediate_size=32, num_key_value_heads=1, bos_token_id=0, eos_token_id=0
        )
    ),
    "bert": lambda: transformers.BertForMaskedLM(transformers.BertConfig(**SMALL, intermediate_size=32)),
    "bare_roberta": lambda: transformers.RobertaModel(
        transformers.RobertaConfig(**SMALL, intermediate_size=32, max_position_embeddings=40)
    ),
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(**SMALL, ffn_dim=32, max_position_embeddings=40, word_embed_proj_dim=16)
    ),
}


@pytest.fixture(params=FAMILIES)
def model(request):
    return FAMILIES[request.param]().eval()


@pytest.fixture
def ids():
    return torch.randint(4, 50, (2, 9))


def test_residuals_equal_hidden_states_up_to_the_last_block(model, ids):
    names = hookpoint_names(model)
    assert names == ["resid.0", "resid.1", "resid.2", "resid.3"]
    with torch.no_grad():
        reference = model(input_ids=ids, output_hidden_states=True).hidden_states
    found = residuals(model, ids, names)
    for depth, name in enumerate(names[:-1]):
        torch.testing.assert_close(found[name], reference[depth], msg=name)


def test_last_residual_is_the_last_blocks_output_before_the_final_norm(model, ids):
    outputs = []
    handle = find_blocks(model)[1][-1].register_forward_hook(
        lambda _m, _a, out: outputs.append(out[0] if isinstance(out, tuple) else out)
    )
    with torch.no_grad():
        model(input_ids=ids)
    handle.remove()
    torch.testing.assert_close(residuals(model, ids, ["resid.3"])["resid.3"], outputs[0])


def test_blocks_after_the_last_hookpoint_are_not_run_and_no_hook_stays(model, ids):
    calls = []
    handles = [
        b.register_forward_hook(lambda *_, i=i: calls.append(i)) for i, b in enumerate(find_blocks(model)[1])
    ]
    residuals(model, ids, ["resid.0", "resid.2"])
    assert calls == [0, 1]
    for handle in handles:
        handle.remove()
    left = [m for m in model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert left == []


def test_hooks_are_removed_after_an_error(ids):
    model = FAMILIES["gpt2"]()
    with pytest.raises(IndexError):
        residuals(model, torch.full((1, 3), 999), ["resid.1"])
    assert [m for m in model.modules() if isinstance(m, nn.Module) and m._forward_hooks] == []


def test_missing_hookpoint_is_an_error_that_lists_those_there_are(ids):
    with pytest.raises(InputError, match=r"has no resid.9; it has resid.0, resid.1, resid.2, resid.3"):
        residuals(FAMILIES["llama"](), ids, ["resid.1", "resid.9"])


def test_a_hookpoint_named_twice_is_an_error(ids):
    with pytest.raises(InputError, match="each hookpoint once"):
        residuals(FAMILIES["gpt2"](), ids, ["resid.1", "resid.1"])


def test_encoder_decoder_is_an_error():
    config = transformers.T5Config(vocab_size=20, d_model=8, d_kv=4, d_ff=8, num_layers=2, num_heads=2)
    with pytest.raises(InputError, match="encoder-decoder"):
        find_blocks(transformers.T5ForConditionalGeneration(config))
