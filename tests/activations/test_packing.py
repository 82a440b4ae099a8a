"""Packing: separators, no padding, whole documents held out."""

import pytest
import torch

from sae.activations.packing import pack
from sae.errors import InputError

DOCUMENTS = [f"document number {i} says {'yes' if i % 2 else 'no'}" for i in range(60)]


def _pack(tokenizer, documents=DOCUMENTS, n_tokens=1200, context_length=16, held_out=0.3):
    return pack(documents, tokenizer, n_tokens=n_tokens, context_length=context_length, held_out=held_out)


def test_contexts_are_the_documents_laid_end_to_end_with_separators(byte_tokenizer):
    train, held_out = _pack(byte_tokenizer)
    for split in (train, held_out):
        texts = byte_tokenizer.decode(split.token_ids.flatten()).split("<|end|>")
        assert texts[0] == "" and all(text in DOCUMENTS for text in texts[1:-1])
        assert DOCUMENTS[int(split.document_ids[0, 0])] == texts[1]
        separators = split.token_ids.flatten() == 256
        starts = torch.cat([torch.tensor([True]), split.document_ids.flatten().diff() != 0])
        assert torch.equal(separators, starts)


def test_no_document_is_on_both_sides_and_copies_stay_together(byte_tokenizer):
    train, held_out = _pack(byte_tokenizer, documents=DOCUMENTS[:20] * 3)
    texts = [{DOCUMENTS[i % 20] for i in split.document_ids.unique().tolist()} for split in (train, held_out)]
    assert texts[0] and texts[1] and not texts[0] & texts[1]


def test_packing_is_the_same_every_time(byte_tokenizer):
    for ours, again in zip(_pack(byte_tokenizer), _pack(byte_tokenizer), strict=True):
        assert torch.equal(ours.token_ids, again.token_ids)


def test_all_tokens_asked_for_are_taken_up_to_whole_contexts(byte_tokenizer):
    train, held_out = _pack(byte_tokenizer, n_tokens=1000)
    rows = train.token_ids.numel() + held_out.token_ids.numel()
    assert 1000 - 2 * 16 < rows <= 1000


def test_empty_documents_are_passed_over(byte_tokenizer):
    with_empty = [text for pair in zip(DOCUMENTS, ["", "  \n"] * 30, strict=True) for text in pair]
    assert torch.equal(_pack(byte_tokenizer)[0].token_ids, _pack(byte_tokenizer, with_empty)[0].token_ids)


@pytest.mark.parametrize("documents", [[], ["", " \n "]])
def test_empty_text_is_an_error(byte_tokenizer, documents):
    with pytest.raises(InputError, match="holds no text"):
        _pack(byte_tokenizer, documents)


def test_too_little_text_is_an_error_that_says_how_much_there_was(byte_tokenizer):
    with pytest.raises(
        InputError, match=r"`n_tokens`=5,000 asked for, but the data set has only [\d,]+ tokens in 60"
    ):
        _pack(byte_tokenizer, n_tokens=5000)


def test_split_without_a_context_is_an_error(byte_tokenizer):
    with pytest.raises(InputError, match="held_out split got .* less than one context of 512"):
        _pack(byte_tokenizer, context_length=512, held_out=0.05)
