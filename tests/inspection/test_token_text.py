"""Tokens are shown as what they are, and nothing in them acts on a terminal or a page."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import PreTrainedTokenizerFast

from sae.activations.language_model import load_language_model
from sae.errors import InputError
from sae.inspection.token_text import TokenText, quoted


def test_token_text_shows_leading_spaces_and_newlines(byte_tokenizer):
    text = TokenText(byte_tokenizer)
    shown = [text(i) for i in byte_tokenizer(" a\n", add_special_tokens=False)["input_ids"]]
    assert shown == ['" "', '"a"', '"\\n"']


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ('say "hi" \\', r'"say \"hi\" \\"'),
        ("a\u202eb\u200fc", r'"a\u202eb\u200fc"'),  # marks that turn the direction of writing
        ("\x1b[31m\x9b\x00", r'"\u001b[31m\u009b\u0000"'),  # terminal escapes
        ("x\u00a0y\u2028", r'"x\u00a0y\u2028"'),
        ("שלום é 漢 🙂", '"שלום é 漢 🙂"'),
        ("\U000e0041", r'"\U000e0041"'),
        ("<script>&amp;", '"<script>&amp;"'),
    ],
)
def test_what_does_not_print_is_escaped(text, shown):
    assert quoted(text) == shown
    assert shown.isprintable()


def test_bytes_that_are_no_character_are_shown_as_bytes(byte_tokenizer):
    text = TokenText(byte_tokenizer)
    ids = byte_tokenizer("é…", add_special_tokens=False)["input_ids"]
    assert [text(i) for i in ids] == [r'"\xc3"', r'"\xa9"', r'"\xe2"', r'"\x80"', r'"\xa6"']


def test_byte_fallback_and_spaces_of_sentencepiece_style_tokenizers():
    vocabulary = {"<unk>": 0, "<0xE2>": 1, "▁the": 2, "a": 3, "▁": 4}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    text = TokenText(PreTrainedTokenizerFast(tokenizer_object=tokenizer))
    assert [text(1), text(2), text(3)] == [r'"\xe2"', '" the"', '"a"']


def test_a_token_is_found_by_what_is_shown(byte_tokenizer):
    text = TokenText(byte_tokenizer)
    for shown in ("e", " ", "\n", "<|end|>"):
        assert text(text.token_id(shown)) == quoted(shown)
    demo = TokenText(load_language_model("demo").tokenizer)
    for shown in (" the", "self", "\n    ", " np"):
        assert demo(demo.token_id(shown)) == quoted(shown)


def test_text_that_is_not_one_token_is_an_error_that_shows_its_pieces(byte_tokenizer):
    with pytest.raises(InputError, match=r'got "the", which is "t" "h" "e"; give one of these'):
        TokenText(byte_tokenizer).token_id("the")
    with pytest.raises(InputError, match="which is nothing"):
        TokenText(byte_tokenizer).token_id("")
