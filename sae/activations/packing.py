"""Documents to contexts: tokenised, held out by whole document, packed without padding."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from sae.activations.language_model import separator_id
from sae.errors import InputError

_TOKENIZED_AT_ONCE = 32  # documents


class PackedTokens(NamedTuple):
    """The contexts of one split."""

    token_ids: Int[Tensor, "sequences context"]
    document_ids: Int[Tensor, "sequences context"]
    """Number of the document (in reading order) that each token belongs to, its separator included."""


def pack(
    documents: Iterable[str],
    tokenizer: PreTrainedTokenizerBase,
    *,
    n_tokens: int,
    context_length: int,
    held_out: float,
) -> tuple[PackedTokens, PackedTokens]:
    """Packs documents until `n_tokens` are together; returns the train split and the held-out split.

    Each document is its separator token followed by its tokens; documents follow one another in their
    split, and contexts are cut from that stream, so nothing is padded and no context mixes splits. A
    document is held out by a hash of its text: copies of one text fall on one side. The end of each
    stream that does not fill a context is left out. A pure function of its arguments.

    Args:
        documents: texts; empty ones are passed over.
        tokenizer: used without its own special tokens.
        n_tokens: tokens taken over both splits, the last document cut to fit; rows are whole contexts.
        context_length: tokens per context, the separators among them.
        held_out: share of the documents held out.

    Raises:
        InputError: if the text is empty or yields fewer tokens than asked, or a split is empty.
    """
    separator = separator_id(tokenizer)
    streams: dict[str, tuple[list[np.ndarray], list[np.ndarray]]] = {"train": ([], []), "held_out": ([], [])}
    total = count = 0
    with tqdm(total=n_tokens, desc="tokenize", unit=" tokens", unit_scale=True, leave=False) as bar:
        for number, (text, ids) in enumerate(_tokenized(documents, tokenizer)):
            split = "held_out" if _is_held_out(text, held_out) else "train"
            ids = np.array([separator, *ids][: n_tokens - total], dtype=np.int32)
            streams[split][0].append(ids)
            streams[split][1].append(np.full(len(ids), number, dtype=np.int32))
            count += 1
            total += len(ids)
            bar.update(len(ids))
            if total == n_tokens:
                break
    if count == 0:
        raise InputError("`dataset` holds no text (every document is empty).")
    if total < n_tokens:
        raise InputError(
            f"`n_tokens`={n_tokens:,} asked for, but the data set has only {total:,} tokens in {count:,}"
            " documents; lower `n_tokens` or give more text."
        )
    train, apart = (_cut(*streams[split], context_length, split, held_out) for split in ("train", "held_out"))
    return train, apart


def _tokenized(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[str, list[int]]]:
    waiting: list[str] = []
    for text in documents:
        if text.strip():
            waiting.append(text)
        if len(waiting) == _TOKENIZED_AT_ONCE:
            yield from _encode(waiting, tokenizer)
            waiting = []
    yield from _encode(waiting, tokenizer)


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, list[int]]]:
    if texts:
        # verbose=False: contexts are cut after packing, so a document longer than the model's is no problem.
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        yield from zip(texts, encoded["input_ids"], strict=True)


def _is_held_out(text: str, share: float) -> bool:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") < share * 2**64


def _cut(
    ids: list[np.ndarray], documents: list[np.ndarray], context_length: int, split: str, held_out: float
) -> PackedTokens:
    stream = np.concatenate(ids) if ids else np.empty(0, np.int32)
    n_sequences = len(stream) // context_length
    if n_sequences == 0 and (split == "train" or held_out > 0):
        raise InputError(
            f"the {split} split got {len(stream):,} tokens of {len(ids):,} documents, less than one context"
            f" of {context_length}; documents are held out whole, so give more of them, raise `n_tokens`,"
            f" lower `context_length`, or change `held_out`={held_out:g}."
        )
    kept = n_sequences * context_length
    of_document = np.concatenate(documents)[:kept] if documents else stream
    return PackedTokens(
        torch.from_numpy(stream[:kept].reshape(n_sequences, context_length)),
        torch.from_numpy(of_document[:kept].reshape(n_sequences, context_length)),
    )
