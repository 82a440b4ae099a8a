"""Documents to contexts: tokenised, held out by whole document, packed without padding, on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from sae.activations.columns import Columns
from sae.activations.documents import Document, TokenStream
from sae.activations.language_model import separator_id
from sae.activations.source import check_context_has_rows
from sae.errors import InputError

_PIECE = 4096  # tokens of what passes for a document in a stream that does not separate them
_TOKENIZED_AT_ONCE = 32  # documents
_AT_ONCE = 2**20  # tokens in memory
_LONGEST_VOCABULARY = 2**31  # ids are kept as int32


class PackedTokens(NamedTuple):
    """The contexts of both splits, the train sequences before the held-out ones; files, not memory."""

    token_ids: Int[Tensor, "sequences context"]
    document_ids: Int[Tensor, "sequences context"]
    """Number (in reading order) of the document that each token belongs to, its separator included; a
    begin token put before a context counts to the document of the token after it. Both are int32."""
    cached: Bool[Tensor, "sequences context"] | None
    """Which rows are to be cached; None = all."""
    n_train: int
    """Train sequences."""
    documents: int
    """Documents taken, over both splits."""


def pack(
    documents: Iterable[Document],
    tokenizer: PreTrainedTokenizerBase,
    *,
    n_tokens: int,
    context_length: int,
    held_out: float,
    bos_in_every_context: bool = False,
    exclude_first_position: bool = False,
    exclude_special_tokens: bool = False,
    vocabulary: int | None = None,
    folder: Path,
) -> PackedTokens:
    """Packs documents until `n_tokens` are together, in files, so that memory does not bound their number.

    A text is its separator token followed by its tokens. A document of token ids is taken as it is,
    nothing added, so rows of exactly `context_length` ids come back as contexts (where
    `bos_in_every_context` adds nothing). Documents follow one another in their split, and contexts are
    cut from that stream, so nothing is padded and no context mixes splits. A document is held out by a
    hash of its text, or of its ids as int32: copies of one document fall on one side. The end of each
    stream that does not fill a context is left out. A pure function of its arguments.

    Args:
        documents: texts, 1-D arrays of token ids, or streams of ids, which are cut into documents before
            each separator token (without any, every 4,096 tokens); empty ones are passed over.
        tokenizer: used without its own special tokens.
        n_tokens: tokens taken from documents over both splits, separators of texts included, the last
            document cut to fit; rows are whole contexts.
        context_length: tokens per context, the separators among them.
        held_out: share of the documents held out.
        bos_in_every_context: contexts begin with the separator token; one that does not is given it, and
            then holds one token of the documents less. Those that are added do not count to `n_tokens`.
        exclude_first_position: rows of position 0 are not cached.
        exclude_special_tokens: rows at the tokenizer's special tokens are not cached.
        vocabulary: how many tokens the model embeds; None = any id that fits int32 will do.
        folder: for the files, `*.tmp`: 8 bytes per token while documents are read, up to 17 while contexts
            are cut, 8 or 9 from then on. The tensors returned are views of them. An error leaves none.

    Raises:
        InputError: if there is no text or fewer tokens than asked; a split is without a whole context, or
            without a cached row; an id is outside the vocabulary; or `context_length` is too short.
    """
    wanted = (bos_in_every_context, exclude_first_position, exclude_special_tokens)
    layout = _layout(tokenizer, context_length, *wanted, vocabulary)
    tokenized = _tokenized(documents, tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as on_error:
        packed = on_error.enter_context(Columns(folder, "contexts", layout.masked))
        n_train, taken = _write(packed, folder, layout, tokenized, n_tokens, held_out, vocabulary)
        on_error.pop_all()  # the files of the contexts stay
    arrays = packed.mapped().items()
    columns = {name: torch.from_numpy(array).view(-1, context_length) for name, array in arrays}
    return PackedTokens(columns["tokens"], columns["documents"], columns.get("cached"), n_train, taken)


class _Layout(NamedTuple):
    """How contexts are made from a stream."""

    context_length: int
    begin: int | None
    """Token that every context begins with."""
    without_first: bool
    without: np.ndarray
    """Tokens whose rows are not cached."""

    @property
    def masked(self) -> bool:
        return self.without_first or len(self.without) > 0


def _layout(
    tokenizer: PreTrainedTokenizerBase,
    context_length: int,
    bos_in_every_context: bool,
    exclude_first_position: bool,
    exclude_special_tokens: bool,
    vocabulary: int | None,
) -> _Layout:
    check_context_has_rows(context_length, bos_in_every_context, exclude_first_position)
    separator = separator_id(tokenizer)
    if bos_in_every_context and vocabulary is not None and separator >= vocabulary:
        raise _not_a_pair(separator, vocabulary)
    special = {separator, *tokenizer.all_special_ids} if exclude_special_tokens else set()
    begin = separator if bos_in_every_context else None
    return _Layout(context_length, begin, exclude_first_position, np.array(sorted(special), np.int32))


def _write(
    packed: Columns,
    folder: Path,
    layout: _Layout,
    tokenized: Iterator[tuple[str | np.ndarray, np.ndarray]],
    n_tokens: int,
    held_out: float,
    vocabulary: int | None,
) -> tuple[int, int]:
    """Writes all contexts, by way of a stream per split; returns train sequences and documents taken."""
    with Columns(folder, "train", False) as train, Columns(folder, "held_out", False) as apart:
        streams = {"train": train, "held_out": apart}
        taken = _fill(streams, tokenized, n_tokens, held_out, vocabulary)
        cut = {split: _cut(stream, packed, layout) for split, stream in streams.items()}
    for split in ("train", "held_out") if held_out > 0 else ("train",):
        _check_split(split, cut[split], taken[split], layout.context_length, held_out)
    return cut["train"].sequences, sum(taken.values())


def _fill(
    streams: dict[str, Columns],
    tokenized: Iterator[tuple[str | np.ndarray, np.ndarray]],
    n_tokens: int,
    held_out: float,
    vocabulary: int | None,
) -> dict[str, int]:
    """Appends documents to the streams of their splits; returns how many each split took."""
    taken = dict.fromkeys(streams, 0)
    total = 0
    with tqdm(total=n_tokens, desc="tokenize", unit=" tokens", unit_scale=True, leave=False) as bar:
        for number, (document, ids) in enumerate(tokenized):
            _check_ids(document, ids, number, vocabulary)
            split = "held_out" if _is_held_out(document, held_out) else "train"
            for part in _parts(ids[: n_tokens - total]):
                streams[split].append(tokens=part, documents=np.full(len(part), number, np.int32))
                total += len(part)
                bar.update(len(part))
            taken[split] += 1
            if total == n_tokens:
                break
    count = sum(taken.values())
    if count == 0:
        raise InputError("`dataset` holds no text (every document is empty).")
    if total < n_tokens:
        raise InputError(
            f"`n_tokens`={n_tokens:,} asked for, but the data set has only {total:,} tokens in {count:,}"
            " documents; lower `n_tokens` or give more text."
        )
    return taken


def _tokenized(
    documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[str | np.ndarray, np.ndarray]]:
    """Documents that are not empty, with their tokens."""
    waiting: list[str] = []
    for document in documents:
        if isinstance(document, str):
            if document.strip():
                waiting.append(document)
            if len(waiting) == _TOKENIZED_AT_ONCE:
                yield from _encode(waiting, tokenizer)
                waiting = []
            continue
        yield from _encode(waiting, tokenizer)
        waiting = []
        if isinstance(document, TokenStream):
            yield from ((ids, ids) for ids in _split_stream(document.ids, separator_id(tokenizer)))
        elif document.size:
            yield document, document
    yield from _encode(waiting, tokenizer)


def _split_stream(ids: np.ndarray, separator: int) -> Iterator[np.ndarray]:
    """Documents of a stream, each with the separator that it begins with; found piece by piece.

    A stream without any separator says nothing of documents: it is cut into pieces of one length.
    """
    if not any((part == separator).any() for part in _parts(ids)):
        yield from (ids[begin : begin + _PIECE] for begin in range(0, len(ids), _PIECE))
        return
    begin, at = 0, 0
    for part in _parts(ids):
        for place in (np.flatnonzero(part == separator) + at).tolist():
            if place > begin:
                yield ids[begin:place]
            begin = place
        at += len(part)
    if begin < len(ids):
        yield ids[begin:]


def _encode(texts: list[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[tuple[str, np.ndarray]]:
    if texts:
        separator = separator_id(tokenizer)
        # verbose=False: contexts are cut after packing, so a document longer than the model's is no problem.
        encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)
        for text, ids in zip(texts, encoded["input_ids"], strict=True):
            yield text, np.array([separator, *ids], dtype=np.int32)


def _parts(ids: np.ndarray) -> Iterator[np.ndarray]:
    """An array that may be larger than memory, piece by piece."""
    for begin in range(0, len(ids), _AT_ONCE):
        yield ids[begin : begin + _AT_ONCE]


def _check_ids(document: str | np.ndarray, ids: np.ndarray, number: int, vocabulary: int | None) -> None:
    limit = vocabulary or _LONGEST_VOCABULARY
    for part in _parts(ids):
        low, high = int(part.min()), int(part.max())
        if low >= 0 and high < limit:
            continue
        bad = low if low < 0 else high
        if isinstance(document, str):
            raise _not_a_pair(bad, limit)
        raise InputError(
            f"`dataset`: document {number:,} has token {bad}, the model embeds only 0 to {limit - 1}; the"
            " ids belong to another tokenizer: give those of the model's, or text."
        )


def _not_a_pair(token: int, vocabulary: int) -> InputError:
    return InputError(
        f"`model`: its tokenizer gives token {token}, the model embeds only 0 to {vocabulary - 1}; they are"
        " not a pair: give the model together with its own tokenizer."
    )


def _is_held_out(document: str | np.ndarray, share: float) -> bool:
    digest = hashlib.sha256()
    if isinstance(document, str):
        digest.update(document.encode())
    else:
        for part in _parts(document):
            digest.update(part.astype("<i4").tobytes())
    return int.from_bytes(digest.digest()[:8], "big") < share * 2**64


class _Cut(NamedTuple):
    """What came of a stream."""

    tokens: int
    sequences: int
    rows: int


def _cut(stream: Columns, packed: Columns, layout: _Layout) -> _Cut:
    """Appends the contexts of a split's stream to `packed`."""
    columns = stream.mapped()
    tokens, documents = columns["tokens"], columns["documents"]
    sequences = rows = 0
    for starts in _starts(tokens, layout.context_length, layout.begin):
        at = starts[:, None] + np.arange(layout.context_length)
        if layout.begin is not None:
            added = tokens[starts] != layout.begin
            at = np.maximum(at - added[:, None], starts[:, None])
        ids = tokens[at]
        if layout.begin is not None:
            ids[:, 0] = layout.begin
        context = {"tokens": ids, "documents": documents[at]}
        if layout.masked:
            cached = ~np.isin(ids, layout.without)
            cached[:, 0] &= not layout.without_first
            context["cached"] = cached
        packed.append(**context)
        sequences += len(ids)
        rows += int(context["cached"].sum()) if layout.masked else ids.size
    return _Cut(len(tokens), sequences, rows)


def _starts(tokens: np.ndarray, context_length: int, begin: int | None) -> Iterator[np.ndarray]:
    """Where contexts begin in a stream, in groups small enough to be cut at once."""
    at_once = max(1, _AT_ONCE // context_length)
    if begin is None:
        whole = len(tokens) // context_length
        for first in range(0, whole, at_once):
            yield np.arange(first, min(first + at_once, whole)) * context_length
        return
    group: list[int] = []
    start = 0
    while start < len(tokens):
        end = start + context_length - int(tokens[start] != begin)
        if end > len(tokens):
            break
        group.append(start)
        start = end
        if len(group) == at_once:
            yield np.array(group)
            group = []
    if group:
        yield np.array(group)


def _check_split(split: str, cut: _Cut, documents: int, context_length: int, held_out: float) -> None:
    if cut.sequences == 0:
        raise InputError(
            f"the {split} split got {cut.tokens:,} tokens of {documents:,} documents, less than one context"
            f" of {context_length}; documents are held out whole (a 1-D array of token ids is one document):"
            f" give more, raise `n_tokens`, lower `context_length`, or change `held_out`={held_out:g}."
        )
    if cut.rows == 0:
        raise InputError(
            f"the {split} split has {cut.sequences:,} contexts, but no row that `exclude_first_position` and"
            " `exclude_special_tokens` leave to cache; drop one of them, or give other text."
        )
