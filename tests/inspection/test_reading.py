"""Reading a dictionary whose latents are known: planted detectors are found, by evidence, token and text."""

import pytest
import torch

import sae
from sae.activations import ActivationCache
from sae.activations.contexts import cached_positions, token_ids_of
from sae.activations.hookpoints import residuals
from sae.activations.language_model import LanguageModel, load_language_model
from sae.errors import InputError
from sae.inspection import Reading, gather_evidence, latent_page, latent_table, text_table, token_tables
from sae.inspection.output_tokens import output_tokens


def test_output_tokens_by_hand():
    W_U = torch.tensor([[3.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, -2.0]])
    raised, lowered = output_tokens(torch.tensor([[0.0, 1.0]]), W_U, 2)[0]
    assert [t.token for t in raised] == [1, 2] and [t.logit for t in raised] == [1.0, 1.0]
    assert raised[0].cosine == 1.0 and raised[1].cosine == pytest.approx(0.5**0.5)
    assert lowered[0].token == 3 and lowered[0].logit == -2.0 and lowered[0].cosine == -1.0


@pytest.fixture(scope="module")
def detector(tiny_cache, tiny_source):
    """A dictionary with one living latent, which points from the mean to the rows of the letter e."""
    language_model = load_language_model(tiny_source.model)
    batches = list(tiny_cache.batches("train", "resid.1", 4096))
    x = torch.cat([b.x for b in batches])
    token_ids = tiny_cache.token_ids
    tokens = torch.cat([token_ids[b.sequence.long(), b.position.long()] for b in batches])
    letter = language_model.tokenizer("e", add_special_tokens=False)["input_ids"][0]
    dictionary = sae.TopK(16, 4, 1).requires_grad_(False)
    direction = torch.nn.functional.normalize(x[tokens == letter].mean(0) - x.mean(0), dim=0)
    threshold = torch.quantile((x @ direction)[tokens != letter], 0.999)
    dictionary.W_enc_rows.zero_()
    dictionary.W_enc_rows[2], dictionary.W_dec[2] = direction, direction
    dictionary.b_enc.fill_(-1.0)
    dictionary.b_enc[2] = -threshold
    return dictionary, language_model, letter


@pytest.fixture(scope="module")
def reading(detector, tiny_cache):
    dictionary, language_model, _ = detector
    evidence = gather_evidence(dictionary, tiny_cache, "resid.1")
    return Reading(dictionary, "resid.1", evidence, token_ids_of(tiny_cache), language_model)


def test_a_planted_letter_detector_is_read_as_such(reading, detector):
    letter = detector[2]
    found = reading.latent(2)
    assert found.input_tokens[0].token == letter and found.input_tokens[0].share > 0.8
    assert found.input_tokens[0].lift_low > 1 and found.null is not None
    assert found.summary.clarity > max(0.6, found.null.clarity)
    assert found.summary.effective_tokens < 3
    assert len(found.output_tokens) == 10 and len(found.lowered_tokens) == 10
    assert [r.latent for r in reading.clearest(20)] == [2]
    assert '"e"' in latent_table([found], reading.text) and '"e"' in latent_page(found, reading.text)


def test_contexts_show_what_fired(reading, detector, tiny_cache):
    dictionary, _, letter = detector
    found = reading.latent(2)
    assert len(found.top_contexts) > 3
    ids = token_ids_of(tiny_cache)
    for context in [*found.top_contexts, *found.sampled_contexts]:
        assert context.tokens == ids[context.sequence, context.begin : context.begin + 32].tolist()
        assert context.activations[context.peak] > 0 and 0 <= context.quantile <= 1
    strongest = [c.tokens[c.peak] for c in found.top_contexts]
    assert strongest.count(letter) > len(strongest) / 2
    assert found.top_contexts[0].quantile == 1.0
    peaks = [c.activations[c.peak] for c in found.top_contexts]
    assert peaks == sorted(peaks, reverse=True)
    words = [tuple(c.tokens) for c in found.top_contexts]
    assert len(set(words)) == len(words)


def test_quantiles_rise_from_the_weakest_to_the_strongest_firing(reading):
    histogram = reading.latent(2).histogram
    assert len(histogram.edges) == len(histogram.counts) + 1
    assert histogram.counts[0] > 0 and histogram.counts[-1] > 0
    assert sum(histogram.counts) == reading.summary(2).firings
    ends = torch.tensor([histogram.edges[0], histogram.edges[-1]])
    assert reading._quantiles(2, ends) == pytest.approx([0.0, 1.0], abs=1e-6)


def test_a_latent_that_never_fires_is_said_to_be_dead(reading):
    found = reading.latent(0)
    assert found.null is None and found.input_tokens == [] and found.top_contexts == []
    page = latent_page(found, reading.text)
    assert "never fired" in page and "raises" in page
    assert "dead on the rows read" in latent_table([found], reading.text)
    reading.measure_ablations([0])
    assert reading.latent(0).ablation is None


def test_latents_are_found_by_the_token_they_fire_on_and_by_the_one_they_raise(reading, detector):
    letter = detector[2]
    assert [r.latent for r in reading.firing_on(letter)] == [2]
    logits = {i: o.logit for i, o in reading.raising(letter)}
    assert logits[2] == pytest.approx(
        next(iter(output_tokens(reading.dictionary.directions[2:3], reading._W_U[letter : letter + 1], 1)))[
            0
        ][0].logit,
        rel=1e-4,
    )
    assert list(logits.values()) == sorted(logits.values(), reverse=True)
    table = token_tables(reading, letter, 5)
    assert 'fire on "e"' in table and 'raises "e" most' in table
    unseen = next(t for t in range(256) if not (reading._token_ids == t).any())
    assert "none" in token_tables(reading, unseen, 5)


def test_text_is_read_token_by_token(reading, detector):
    dictionary, language_model, letter = detector
    found = reading.on_text("red green sea three one", per_token=2)
    assert len(found.token_ids) == 24 and found.token_ids[0] == 256
    x = residuals(language_model.model, torch.tensor([found.token_ids]), ["resid.1"])["resid.1"]
    expected = dictionary.encode(x[0])[:, 2]
    for row, value in zip(found.latents, expected.tolist(), strict=True):
        assert row == ([(2, pytest.approx(value))] if value > 0 else [])
    firing = [token for token, row in zip(found.token_ids, found.latents, strict=True) if row]
    assert firing.count(letter) > len(firing) / 2
    assert '"e"' in text_table(reading, found)


def test_a_position_that_the_cache_never_has_is_read_as_text_but_has_no_latents(detector, without_first):
    dictionary, language_model, _ = detector
    always = sae.TopK(16, 4, 4).requires_grad_(False)  # fires at every token
    always.W_enc_rows.zero_()
    always.b_enc.fill_(1.0)
    evidence = gather_evidence(always, without_first, "resid.1")
    ids, cached = token_ids_of(without_first), cached_positions(without_first)
    whole = Reading(always, "resid.1", evidence, ids, language_model)
    reading = Reading(always, "resid.1", evidence, ids, language_model, cached)
    assert whole.on_text("red").latents[0] and whole.on_text("red").latents[1]
    assert reading.on_text("red").latents == [[], *whole.on_text("red").latents[1:]]
    for r in (whole, reading):
        r.measure_ablations([1], contexts=3)
    sink = [r.latent(1).ablation.kl for r in (whole, reading)]
    assert sink[0] != sink[1]  # position 0 is not ablated
    context = reading.latent(1).top_contexts[0]
    assert context.begin == 0 and context.tokens == ids[context.sequence].tolist()
    assert context.activations[0] == 0 and all(a > 0 for a in context.activations[1:])


def test_ablation_is_measured_beside_its_null(reading):
    reading.measure_ablations([2], contexts=4)
    ablation = reading.latent(2).ablation
    assert ablation is not None and ablation.positions == 4 and ablation.kl > 0 and ablation.random_kl > 0
    assert "without it, at 4 of its strongest firings" in latent_page(reading.latent(2), reading.text)


@pytest.mark.parametrize(
    ("ask", "match"),
    [
        (lambda r: r.latent(4), "numbered 0 to 3, got 4"),
        (lambda r: r.latent(-1), "numbered 0 to 3, got -1"),
        (lambda r: r.on_text("x" * 32), r"at most 31 tokens .*contexts of 32.*got 32; shorten it"),
        (lambda r: r.on_text(""), "at least one token"),
        (lambda r: r.measure_ablations([9]), "numbered 0 to 3, got 9"),
    ],
)
def test_bad_questions(reading, ask, match):
    with pytest.raises(InputError, match=match):
        ask(reading)


def test_a_model_or_tokenizer_that_does_not_match_is_an_error(reading, detector):
    dictionary, language_model, _ = detector
    other = load_language_model("demo")
    with pytest.raises(InputError, match="d_model=16, demo has 128"):
        Reading(dictionary, "resid.1", reading.evidence, reading._token_ids, other)
    small = other.tokenizer.__class__.from_pretrained(language_model.name)
    mismatched = LanguageModel("tiny", language_model.model, small)
    with pytest.raises(InputError, match="cache has token 400, the tokenizer of tiny knows only 257"):
        Reading(dictionary, "resid.1", reading.evidence, torch.full((2, 32), 400), mismatched)


def test_an_encoder_has_no_output_tokens(tiny_cache, detector):
    import transformers

    dictionary, language_model, letter = detector
    config = transformers.BertConfig(
        vocab_size=257, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32
    )
    encoder = LanguageModel("bert", transformers.BertForMaskedLM(config).eval(), language_model.tokenizer)
    evidence = gather_evidence(dictionary, ActivationCache(tiny_cache.location), "resid.1")
    reading = Reading(dictionary, "resid.1", evidence, token_ids_of(tiny_cache), encoder)
    reading.measure_ablations([2])
    found = reading.latent(2)
    assert found.output_tokens == [] and found.lowered_tokens == [] and found.ablation is None
    assert reading.raising(letter) == [] and "raises" not in latent_page(found, reading.text)
