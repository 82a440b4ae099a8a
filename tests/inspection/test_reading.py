"""Reading a dictionary whose latents are known."""

import pytest
import torch

import sae
from sae.activations.language_model import load_language_model
from sae.errors import InputError
from sae.inspection import Reading, output_tokens
from sae.inspection.token_text import TokenText


def test_output_tokens_by_hand():
    W_U = torch.tensor([[3.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    top = output_tokens(torch.tensor([0.0, 1.0]), W_U, 2)
    assert [t.token for t in top] == [1, 2] and [t.logit for t in top] == [1.0, 1.0]
    assert top[0].cosine == 1.0 and top[1].cosine == pytest.approx(0.5**0.5)


def test_token_text_shows_leading_spaces_and_newlines(byte_tokenizer):
    text = TokenText(byte_tokenizer)
    shown = [text(i) for i in byte_tokenizer(" a\n", add_special_tokens=False)["input_ids"]]
    assert shown == ['" "', '"a"', '"\\n"']


@pytest.fixture
def detector(tiny_cache, tiny_source):
    """A dictionary with one latent that points from the mean to the rows of the letter e."""
    language_model = load_language_model(tiny_source.model)
    batches = list(tiny_cache.batches("train", "resid.1", 4096))
    x = torch.cat([b.x for b in batches])
    token_ids = tiny_cache.token_ids
    tokens = torch.cat([token_ids[b.sequence.long(), b.position.long()] for b in batches])
    letter = language_model.tokenizer("e", add_special_tokens=False)["input_ids"][0]
    dictionary = sae.TopK(16, 4, 1)
    direction = torch.nn.functional.normalize(x[tokens == letter].mean(0) - x.mean(0), dim=0)
    threshold = torch.quantile((x @ direction)[tokens != letter], 0.999)
    with torch.no_grad():
        dictionary.W_enc_rows.zero_()
        dictionary.W_enc_rows[2], dictionary.W_dec[2] = direction, direction
        dictionary.b_enc.fill_(-1.0)
        dictionary.b_enc[2] = -threshold
    return dictionary, language_model, letter


def test_a_planted_letter_detector_is_read_as_such(detector, tiny_cache):
    dictionary, language_model, letter = detector
    reading = Reading(dictionary, tiny_cache, "resid.1", language_model)
    found = reading.latent(2)
    assert found.input_tokens[0].token == letter and found.input_tokens[0].share > 0.8
    assert found.summary.clarity > 0.6 and len(found.output_tokens) == 10
    assert [r.latent for r in reading.clearest(20)] == [2]
    assert '"e"' in reading.table([found]) and '"e"' in reading.page(found)


def test_a_latent_that_never_fires_is_said_to_be_dead(detector, tiny_cache):
    reading = Reading(detector[0], tiny_cache, "resid.1", detector[1])
    page = reading.page(reading.latent(0))
    assert "never fired" in page and "raises the logit" in page


def test_dictionary_of_another_width_is_an_error(tiny_cache, tiny_source):
    with pytest.raises(InputError, match="d_model=8, the cache .* has 16 at resid.1"):
        Reading(sae.TopK(8, 4, 1), tiny_cache, "resid.1", load_language_model(tiny_source.model))
