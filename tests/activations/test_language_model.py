"""Loading, and the unembedding with the final norm folded in."""

from dataclasses import replace

import pytest
import torch
import transformers
from torch import nn

from sae.activations import ActivationDataModule, Source, harvest
from sae.activations.hookpoints import residuals
from sae.activations.language_model import (
    LanguageModel,
    final_norm,
    language_model_of,
    load_language_model,
    norm_gain,
    separator_id,
    unembedding,
    weights_hash,
)
from sae.errors import InputError

GATED = {
    "vocab_size": 50,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "num_key_value_heads": 1,
    "head_dim": 8,
}


def _opt(embedding_width):
    return transformers.OPTConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, ffn_dim=32,
        max_position_embeddings=40, word_embed_proj_dim=embedding_width,
    )  # fmt: skip


CAUSAL = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0)
    ),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**GATED)),
    "gpt_neox": lambda: transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            vocab_size=50,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            bos_token_id=0,
            eos_token_id=0,
        )  # fmt: skip
    ),
    "opt": lambda: transformers.OPTForCausalLM(_opt(16)),
    "gemma": lambda: transformers.GemmaForCausalLM(transformers.GemmaConfig(**GATED)),
    "gemma2": lambda: transformers.Gemma2ForCausalLM(
        transformers.Gemma2Config(**GATED, final_logit_softcapping=None)
    ),
}
FINAL_NORMS = {
    "gpt2": "transformer.ln_f",
    "llama": "model.norm",
    "gpt_neox": "gpt_neox.final_layer_norm",
    "opt": "model.decoder.final_layer_norm",
    "gemma": "model.norm",
    "gemma2": "model.norm",
}


@pytest.fixture(params=CAUSAL)
def model(request):
    model = CAUSAL[request.param]().eval().requires_grad_(False)
    for parameter in final_norm(model).parameters():
        nn.init.uniform_(parameter, 0.5, 2.0)
    return model


def test_unembedding_gives_the_models_own_logits_up_to_a_constant(model, byte_tokenizer):
    """Folding is exact: normalised residual @ W_U.T differs from the logits by one number per row."""
    ids = torch.randint(50, (2, 7))
    x = residuals(model, ids, ["resid.2"])["resid.2"]
    norm = final_norm(model)
    bias = norm(torch.zeros(1, 16)).squeeze()  # of layer norms; zero for RMS norms
    gain = norm_gain(norm, 16)
    normalised = (norm(x) - bias) / gain
    logits = model(input_ids=ids).logits - model.get_output_embeddings()(bias)
    ours = normalised @ unembedding(LanguageModel("m", model, byte_tokenizer)).T
    torch.testing.assert_close(ours, logits - logits.mean(-1, keepdim=True), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("family", CAUSAL)
def test_final_norm_is_the_one_after_the_blocks(family):
    """Not the last norm inside a block: Gemma 2 has one after its MLP."""
    model = CAUSAL[family]().eval()
    assert final_norm(model) is model.get_submodule(FINAL_NORMS[family])


def test_gemma_2_unembedding_is_one_plus_the_norm_weight_and_ignores_soft_capping(byte_tokenizer):
    """Computed from the weights; capping bends logits, but keeps which of them a direction raises most."""
    config = transformers.Gemma2Config(**GATED, final_logit_softcapping=2.0)
    model = transformers.Gemma2ForCausalLM(config).eval().requires_grad_(False)
    nn.init.uniform_(model.model.norm.weight, -0.5, 1.0)
    W_U = model.lm_head.weight * (1 + model.model.norm.weight)
    ours = unembedding(LanguageModel("m", model, byte_tokenizer))
    torch.testing.assert_close(ours, W_U - W_U.mean(0), rtol=1e-4, atol=1e-4)
    ids = torch.randint(50, (2, 7))
    x = residuals(model, ids, ["resid.2"])["resid.2"]
    normalised = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + config.rms_norm_eps)
    capped = 2.0 * torch.tanh(normalised @ W_U.T / 2.0)
    torch.testing.assert_close(model(input_ids=ids).logits, capped, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", ["gpt_neox", "gemma2"])
def test_half_precision_models_load_and_run(family, tmp_path, byte_tokenizer):
    dtype = {"gpt_neox": torch.float16, "gemma2": torch.bfloat16}[family]
    CAUSAL[family]().to(dtype).save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    loaded = load_language_model(str(tmp_path))
    x = residuals(loaded.model, torch.randint(50, (2, 7)), ["resid.1"])["resid.1"]
    W_U = unembedding(loaded)
    assert x.dtype == dtype and x.isfinite().all()
    assert W_U is not None and W_U.dtype == torch.float32 and W_U.shape == (50, 16)


def test_no_unembedding_where_the_head_has_another_width(byte_tokenizer):
    model = transformers.OPTForCausalLM(_opt(8))
    assert unembedding(LanguageModel("m", model, byte_tokenizer)) is None


def test_norm_gain_is_read_from_the_function_not_the_weight():
    norm = transformers.models.gemma.modeling_gemma.GemmaRMSNorm(8)  # gain is 1 + weight
    nn.init.constant_(norm.weight, 0.5)
    torch.testing.assert_close(norm_gain(norm, 8), torch.full((8,), 1.5), rtol=1e-4, atol=1e-4)


def test_encoder_has_no_unembedding(byte_tokenizer):
    config = {k: v for k, v in GATED.items() if k not in ("num_key_value_heads", "head_dim")}
    model = transformers.BertForMaskedLM(transformers.BertConfig(**config))
    assert unembedding(LanguageModel("m", model, byte_tokenizer)) is None


def test_loading_keeps_the_head_and_dtype_that_were_saved(tmp_path, byte_tokenizer):
    saved = CAUSAL["llama"]().to(torch.bfloat16)
    saved.save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    loaded = load_language_model(str(tmp_path)).model
    assert type(loaded) is type(saved) and loaded.dtype == torch.bfloat16 and not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert weights_hash(loaded) == weights_hash(saved)


def test_a_bare_model_gets_no_random_head(tmp_path, byte_tokenizer):
    CAUSAL["llama"]().model.save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    assert load_language_model(str(tmp_path)).model.get_output_embeddings() is None


def test_weights_hash_sees_one_changed_number():
    model = CAUSAL["gpt2"]()
    before = weights_hash(model)
    with torch.no_grad():
        model.transformer.h[1].mlp.c_fc.weight[0, 0] += 1e-3
    assert weights_hash(model) != before


# --- random weights in place of the trained ones


def test_random_weights_are_those_of_their_seed_and_not_the_trained_ones():
    state = torch.random.get_rng_state()
    first, again, other = (load_language_model("demo", "cpu", seed) for seed in (3, 3, 4))
    assert torch.equal(state, torch.random.get_rng_state())  # nothing is drawn from the run's generator
    trained = load_language_model("demo")
    hashes = [weights_hash(found.model) for found in (first, again, other, trained)]
    assert hashes[0] == hashes[1] and len(set(hashes)) == 3
    assert type(first.model) is type(trained.model) and not first.model.training
    assert not any(p.requires_grad for p in first.model.parameters())
    assert first.tokenizer.get_vocab() == trained.tokenizer.get_vocab()
    of_trained = dict(trained.model.named_parameters())
    for name, p in first.model.named_parameters():
        assert p.shape == of_trained[name].shape and p.dtype == of_trained[name].dtype, name
    standard_deviation = first.model.get_input_embeddings().weight.std().item()
    assert standard_deviation == pytest.approx(first.model.config.initializer_range, rel=0.02)


def test_random_weights_need_no_trained_ones_and_have_the_configured_dtype(tmp_path, byte_tokenizer):
    CAUSAL["gpt_neox"]().half().save_pretrained(tmp_path)
    byte_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    model = load_language_model(str(tmp_path), "cpu", 0).model
    assert type(model).__name__ == "GPTNeoXForCausalLM" and model.dtype == torch.float16
    x = residuals(model, torch.randint(50, (2, 7)), ["resid.1"])["resid.1"]
    assert x.isfinite().all() and x.std() > 0


@pytest.fixture(scope="module")
def of_random(tmp_path_factory, text_file):
    """A cache of the demo model with random weights, and what it was made from."""
    source = Source(dataset=str(text_file), n_tokens=2000, context_length=32, held_out=0.2, random_weights=3)
    return harvest(source, tmp_path_factory.mktemp("random") / "cache"), source


def test_a_cache_of_random_weights_says_so_and_finds_them_again(of_random):
    cache, _ = of_random
    assert cache.manifest["model"] == "demo with random weights of seed 3"
    assert cache.manifest["tokenizer"] == "demo"
    found = language_model_of(cache.manifest).model
    assert weights_hash(found) == cache.manifest["model_hash"]
    assert weights_hash(found) == weights_hash(load_language_model("demo", "cpu", 3).model)
    rows = torch.cat([batch.x for batch in cache.batches("held_out", "resid.2", 512)])
    assert rows.isfinite().all() and rows.std() > 0


@pytest.mark.parametrize(
    ("seed", "told"),
    [
        (None, r"differs in random_weights \(cache: 3, config: None\)"),
        (4, r"differs in random_weights \(cache: 3, config: 4\)"),
    ],
)
def test_a_cache_of_random_weights_is_no_cache_of_others(of_random, seed, told):
    cache, source = of_random
    data = ActivationDataModule(str(cache.location), replace(source, random_weights=seed), batch_size=64)
    with pytest.raises(InputError, match=told):
        data.prepare_data()
    with pytest.raises(InputError, match="holds the cache of another source"):
        harvest(replace(source, random_weights=seed), cache.location)
    ActivationDataModule(str(cache.location), source, batch_size=64).prepare_data()


def test_a_cache_of_trained_weights_is_no_cache_of_random_ones(tiny_cache, tiny_source):
    source = replace(tiny_source, random_weights=0)
    with pytest.raises(InputError, match=r"differs in random_weights \(cache: None, config: 0\)"):
        ActivationDataModule(str(tiny_cache.location), source, batch_size=64).prepare_data()


def test_model_that_cannot_be_loaded_is_an_error(tmp_path):
    with pytest.raises(InputError, match="`model` .* could not be loaded: there is no such folder. Give a"):
        load_language_model(str(tmp_path / "nothing"))


def test_separator_prefers_begin_of_sequence(byte_tokenizer):
    assert separator_id(byte_tokenizer) == 256


def test_tokenizer_without_special_tokens_is_an_error(byte_tokenizer):
    bare = transformers.PreTrainedTokenizerFast(tokenizer_object=byte_tokenizer.backend_tokenizer)
    with pytest.raises(InputError, match="no begin, end, separator or class token"):
        separator_id(bare)
