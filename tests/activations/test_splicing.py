"""A spliced model computes what the formulas say, is otherwise untouched, and gives gradients."""

import inspect

import pytest
import torch

import sae
from sae.activations.first_tokens import KEY_VALUES
from sae.activations.hookpoints import hookpoint_names, residuals, visiting
from sae.activations.language_model import load_language_model
from sae.errors import InputError
from sae.ops.moments import StreamingMoments


@pytest.fixture
def model(tiny_model):
    return load_language_model(str(tiny_model)).model


@pytest.fixture
def ids():
    return torch.randint(0, 50, (2, 9))


@pytest.fixture
def dictionary():
    return sae.TopK(16, 40, 5).requires_grad_(False)


def _hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def _logits(model, ids):
    with torch.no_grad():
        output = model(input_ids=ids)
    return output.logits if "logits" in output else output.last_hidden_state


def _seen_after(model, ids, hookpoint, *splices):
    """The residual stream that the model goes on with."""
    seen = []
    with splices[0], visiting(model, hookpoint, seen.append), torch.no_grad():
        model(input_ids=ids)
    return seen[0]


def _fitted_pca(x):
    moments = StreamingMoments()
    moments.add(x)
    return sae.PCA(x.shape[-1]).fit([x], moments.moments())


def test_a_perfect_dictionary_changes_nothing(family_model, ids):
    clean = _logits(family_model, ids)
    for hookpoint in hookpoint_names(family_model):
        x = residuals(family_model, ids, [hookpoint])[hookpoint].reshape(-1, 16)
        with sae.splice(family_model, hookpoint, _fitted_pca(torch.cat([x, torch.randn(50, 16)]))) as s:
            torch.testing.assert_close(_logits(family_model, ids), clean, atol=1e-4, rtol=1e-3)
        assert s.latents.shape == (2, 9, 16)


def test_replacing_gives_the_model_the_reconstruction(family_model, ids, dictionary):
    clean = _logits(family_model, ids)
    for hookpoint in ("resid.0", "resid.2", "resid.3"):
        x = residuals(family_model, ids, [hookpoint])[hookpoint]
        seen = _seen_after(family_model, ids, hookpoint, sae.splice(family_model, hookpoint, dictionary))
        torch.testing.assert_close(seen, dictionary(x).x_hat)
        with sae.splice(family_model, hookpoint, dictionary):
            assert (_logits(family_model, ids) - clean).abs().max() > 1e-3
    assert torch.equal(_logits(family_model, ids), clean)


def test_keeping_the_error_without_an_edit_is_the_model_itself_bit_for_bit(family_model, ids, dictionary):
    clean = _logits(family_model, ids)
    with sae.splice(family_model, "resid.2", dictionary, keep_error=True):
        assert torch.equal(_logits(family_model, ids), clean)


@pytest.mark.parametrize("keep_error", [False, True])
def test_edits_follow_the_formula(model, ids, dictionary, keep_error):
    x = residuals(model, ids, ["resid.2"])["resid.2"]
    z = dictionary.encode(x)
    strongest, second = z.sum((0, 1)).topk(2).indices.tolist()
    absent = int(z.sum((0, 1)).argmin())
    edited = z.clone()
    edited[..., strongest] = 0.0
    edited[..., second] *= 3.0
    edited[..., absent] = 7.0
    expected = dictionary.decode(edited)
    if keep_error:
        expected = expected + x - dictionary.decode(z)
    seen = _seen_after(
        model,
        ids,
        "resid.2",
        sae.splice(
            model,
            "resid.2",
            dictionary,
            keep_error=keep_error,
            scale={strongest: 0, second: 3.0},
            clamp={absent: 7.0},
        ),
    )
    torch.testing.assert_close(seen, expected)


def test_clamping_replaces_the_activation_where_the_latent_fires_already(model, ids, dictionary):
    x = residuals(model, ids, ["resid.2"])["resid.2"]
    z = dictionary.encode(x)
    latent = int(z.sum((0, 1)).argmax())
    z[..., latent] = 2.5
    seen = _seen_after(model, ids, "resid.2", sae.splice(model, "resid.2", dictionary, clamp={latent: 2.5}))
    torch.testing.assert_close(seen, dictionary.decode(z))


def test_latents_recorded_are_those_of_the_clean_stream(model, ids, dictionary):
    x = residuals(model, ids, ["resid.1"])["resid.1"]
    with sae.splice(model, "resid.1", dictionary, scale={3: 0.0}) as s:
        with pytest.raises(InputError, match="nothing is recorded yet"):
            _ = s.latents
        _logits(model, ids)
    torch.testing.assert_close(s.latents, dictionary.encode(x))
    assert s.code.n_rows == ids.numel()


def test_nested_splices_see_what_the_ones_below_left(model, ids, dictionary):
    with sae.splice(model, "resid.1", dictionary):
        expected = residuals(model, ids, ["resid.2"])["resid.2"]
        with sae.splice(model, "resid.2", dictionary) as upper:
            _logits(model, ids)
    torch.testing.assert_close(upper.latents, dictionary.encode(expected))
    assert _hooks(model) == 0


def test_nothing_stays_hooked_after_an_exception(family_model, ids, dictionary):
    before = _hooks(family_model)
    with pytest.raises(RuntimeError, match="mine"), sae.splice(family_model, "resid.1", dictionary):
        raise RuntimeError("mine")
    assert _hooks(family_model) == before


def test_works_in_the_models_own_dtype(model, ids, dictionary):
    model = model.to(torch.bfloat16)
    try:
        with sae.splice(model, "resid.1", dictionary):
            assert _logits(model, ids).dtype == torch.bfloat16
        with sae.splice(model, "resid.1", dictionary, keep_error=True):
            spliced = _logits(model, ids)
        assert torch.equal(spliced, _logits(model, ids))
    finally:
        model.float()


def test_generation_with_a_key_value_cache_is_steered(model, ids, dictionary):
    def generate():
        return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)

    model.config.use_cache = True
    clean = generate()
    with sae.splice(model, "resid.2", dictionary, keep_error=True) as s:
        assert torch.equal(generate(), clean)
    assert s.latents.shape == (2, 1, 40)
    steered = {}
    for latent in range(8):
        with sae.splice(model, "resid.2", dictionary, keep_error=True, clamp={latent: 200.0}):
            steered[latent] = generate()
    assert any(not torch.equal(tokens, clean) for tokens in steered.values())


@pytest.mark.parametrize("options", [{}, {"keep_error": True, "clamp": {3: 50.0}}, {"scale": {0: 0.0}}])
def test_a_first_position_that_is_skipped_passes_untouched_and_has_no_latents(
    family_model, ids, dictionary, options
):
    for hookpoint in ("resid.0", "resid.2"):
        x = residuals(family_model, ids, [hookpoint])[hookpoint]
        whole = sae.splice(family_model, hookpoint, dictionary, **options)
        edited = _seen_after(family_model, ids, hookpoint, whole)
        with sae.splice(family_model, hookpoint, dictionary, skip_first_position=True, **options) as s:
            seen = []
            with visiting(family_model, hookpoint, seen.append), torch.no_grad():
                family_model(input_ids=ids)
        assert torch.equal(seen[0][:, 0], x[:, 0])
        torch.testing.assert_close(seen[0][:, 1:], edited[:, 1:])
        assert (s.latents[:, 0] == 0).all()
        expected = dictionary.encode(x.to(dictionary.directions.dtype))[:, 1:]
        torch.testing.assert_close(s.latents[:, 1:], expected)
    assert _hooks(family_model) == 0


def test_generation_skips_the_first_token_of_the_prompt_only(model, ids, dictionary):
    """With a key-value cache and with padding on the left: the same tokens as without both."""
    model.config.use_cache = True
    prompts = [ids[0, :4], ids[1, :9], ids[0, :1]]
    padded = torch.zeros(3, 9, dtype=torch.long)
    mask = torch.zeros_like(padded)
    for row, prompt in enumerate(prompts):
        padded[row, 9 - len(prompt) :], mask[row, 9 - len(prompt) :] = prompt, 1
    edit = {"clamp": {3: 40.0}, "keep_error": True, "skip_first_position": True}

    def generate(tokens, attention_mask, use_cache):
        options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": 255}
        return model.generate(tokens, attention_mask=attention_mask, use_cache=use_cache, **options)

    with sae.splice(model, "resid.2", dictionary, **edit) as s:
        together = generate(padded, mask, True)[:, 9:]
        assert s.latents.shape == (3, 1, 40) and (s.latents > 0).any(-1).all()
        for row, prompt in enumerate(prompts):
            one = prompt[None]
            alone = generate(one, torch.ones_like(one), False)[:, len(prompt) :]
            assert (s.latents[:, 0] == 0).all() and (s.latents[:, 1:] > 0).any(-1).all()
            assert torch.equal(together[row : row + 1, : alone.shape[1]], alone)
    with sae.splice(model, "resid.2", dictionary, **edit | {"skip_first_position": False}):
        assert not torch.equal(generate(padded, mask, True)[:, 9:], together)


def test_a_pass_of_a_single_first_token_is_left_alone_and_the_next_is_not(model, ids, dictionary):
    with sae.splice(model, "resid.1", dictionary, skip_first_position=True) as s, torch.no_grad():
        output = model(input_ids=ids[:, :1], use_cache=True)
        assert s.latents.shape == (2, 1, 40) and (s.latents == 0).all()
        name = next(name for name in KEY_VALUES if name in inspect.signature(model.forward).parameters)
        model(input_ids=ids[:, 1:2], **{name: output[name]})
        assert (s.latents > 0).any(-1).all()


def test_what_does_not_show_where_sequences_begin_is_refused(model, ids, dictionary):
    with sae.splice(model, "resid.1", dictionary, skip_first_position=True), torch.no_grad():
        with pytest.raises(InputError, match="GPT2LMHeadModel that was spliced"):
            model.transformer(input_ids=ids)
        with pytest.raises(InputError, match=r"\(batch, context\), got \(2, 1, 9, 9\)"):
            model(input_ids=ids, attention_mask=torch.ones(2, 1, 9, 9))
        with pytest.raises(InputError, match="must be a transformers Cache, got list"):
            model(input_ids=ids, past_key_values=[])
        model(input_ids=ids)
    assert _hooks(model) == 0


def test_gradients_to_latents_leave_out_a_first_position_that_is_skipped(model, ids, dictionary):
    with sae.splice(model, "resid.1", dictionary, gradients=True, skip_first_position=True) as s:
        loss = model(input_ids=ids).logits.logsumexp(-1).sum()
    (gradient,) = torch.autograd.grad(loss, s.code.values)
    assert gradient.abs().sum() > 0 and (s.code.rows % 9 > 0).all() and len(gradient) == 2 * 8 * 5


@pytest.mark.parametrize("keep_error", [False, True])
def test_gradients_to_latents_are_the_finite_differences(model, ids, dictionary, keep_error):
    model, dictionary = model.double(), dictionary.double()
    try:
        with sae.splice(model, "resid.1", dictionary, keep_error=keep_error, gradients=True) as s:
            loss = model(input_ids=ids).logits.logsumexp(-1).sum()
        (gradient,) = torch.autograd.grad(loss, s.code.values)
        latent = int(s.code.indices.bincount().argmax())
        here = s.code.indices == latent
        by_scale = float((gradient * s.code.values.detach())[here].sum())
        step = 1e-5
        losses = []
        for factor in (1 + step, 1 - step):
            edit = {"scale": {latent: factor}, "keep_error": keep_error}
            with sae.splice(model, "resid.1", dictionary, **edit), torch.no_grad():
                losses.append(float(model(input_ids=ids).logits.logsumexp(-1).sum()))
        assert abs(by_scale) > 1e-4
        assert by_scale == pytest.approx((losses[0] - losses[1]) / (2 * step), rel=1e-4)
    finally:
        model.float()


def test_gradients_flow_to_the_models_inputs_through_the_dictionary(model, ids, dictionary):
    model, dictionary = model.double(), dictionary.double()
    try:
        embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
        probe = torch.randn_like(embeddings)
        step = 1e-6

        def loss(inputs):
            with sae.splice(model, "resid.1", dictionary):
                return model(inputs_embeds=inputs).logits.logsumexp(-1).sum()

        (gradient,) = torch.autograd.grad(loss(embeddings), embeddings)
        with torch.no_grad():
            rise = float(loss(embeddings + step * probe) - loss(embeddings - step * probe)) / (2 * step)
        assert float((gradient * probe).sum()) == pytest.approx(rise, rel=1e-4)
    finally:
        model.float()


def test_a_dictionary_without_gradient_says_so_instead_of_cutting_it(model, ids):
    x = residuals(model, ids, ["resid.1"])["resid.1"].reshape(-1, 16)
    moments = StreamingMoments()
    moments.add(x)
    nmf = sae.NMF(16, 4).fit([x], moments.moments())
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    with pytest.raises(InputError, match="gives no gradient"), sae.splice(model, "resid.1", nmf):
        model(inputs_embeds=embeddings)
    with sae.splice(model, "resid.1", nmf, keep_error=True):
        assert model(inputs_embeds=embeddings).logits.requires_grad
    assert _hooks(model) == 0


@pytest.mark.parametrize(
    ("hookpoint", "d_model", "options", "match"),
    [
        ("resid.7", 16, {}, "has no resid.7; it has resid.0"),
        ("resid.1", 24, {}, "d_model=24, GPT2LMHeadModel has 16"),
        ("resid.1", 16, {"scale": {40: 0.0}}, "numbered 0 to 39, got 40"),
        ("resid.1", 16, {"clamp": {-1: 0.0}}, "numbered 0 to 39, got -1"),
        ("resid.1", 16, {"clamp": {2: float("nan")}}, "finite numbers, got nan for latent 2"),
        ("resid.1", 16, {"clamp": {2: 1.0}, "scale": {2: 1.0}}, "both in `scale` and in `clamp`"),
    ],
)
def test_bad_input(model, hookpoint, d_model, options, match):
    dictionary = sae.TopK(d_model, 40, 5)
    with pytest.raises(InputError, match=match), sae.splice(model, hookpoint, dictionary, **options):
        pass
    assert _hooks(model) == 0


def test_gradients_without_autograd_are_refused(model, dictionary):
    with (
        torch.no_grad(),
        pytest.raises(InputError, match="needs autograd"),
        sae.splice(model, "resid.1", dictionary, gradients=True),
    ):
        pass


def test_a_language_model_as_loaded_may_be_spliced(tiny_model, ids, dictionary):
    loaded = sae.load_language_model(str(tiny_model))
    with sae.splice(loaded, "resid.1", dictionary) as s:
        _logits(loaded.model, ids)
    assert s.latents.shape == (2, 9, 40)
