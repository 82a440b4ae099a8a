"""Packing: separators, no padding, whole documents held out, rows that are not cached, bounded memory."""

import hashlib
import tempfile
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.activations import packing
from sae.activations.documents import TokenStream
from sae.activations.packing import pack
from sae.errors import InputError

END = 256
DOCUMENTS = [f"document number {i} says {'yes' if i % 2 else 'no'}" for i in range(60)]


@pytest.fixture
def pack_in(byte_tokenizer, tmp_path):
    """`pack` with defaults, into a folder of its own for each call."""

    def call(documents=DOCUMENTS, n_tokens=1200, context_length=16, held_out=0.3, **flags):
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        sizes = {"n_tokens": n_tokens, "context_length": context_length, "held_out": held_out}
        return pack(documents, byte_tokenizer, **sizes, **flags, folder=folder)

    return call


def _splits(packed):
    """Token and document ids of the train split and of the held-out split."""
    for rows in (slice(0, packed.n_train), slice(packed.n_train, None)):
        yield packed.token_ids[rows], packed.document_ids[rows]


def _rows(count, length, seed=0):
    """Documents of token ids, 0 to 255."""
    return list(np.random.default_rng(seed).integers(0, 256, (count, length)))


def _is_held_out(document, share):
    data = document.encode() if isinstance(document, str) else document.astype("<i4").tobytes()
    return int.from_bytes(hashlib.sha256(data).digest()[:8], "big") / 2**64 < share


def test_contexts_are_the_documents_laid_end_to_end_with_separators(byte_tokenizer, pack_in):
    packed = pack_in()
    assert packed.cached is None and packed.token_ids.dtype == packed.document_ids.dtype == torch.int32
    for ids, documents in _splits(packed):
        texts = byte_tokenizer.decode(ids.flatten()).split("<|end|>")
        assert texts[0] == "" and all(text in DOCUMENTS for text in texts[1:-1])
        assert DOCUMENTS[int(documents[0, 0])] == texts[1]
        starts = torch.cat([torch.tensor([True]), documents.flatten().diff() != 0])
        assert torch.equal(ids.flatten() == END, starts)


def test_no_document_is_on_both_sides_and_copies_stay_together(pack_in):
    for documents in (DOCUMENTS[:20], _rows(20, 20)):
        packed = pack_in(documents * 3, n_tokens=1000)
        sides = [{int(i) % 20 for i in ids.unique()} for _, ids in _splits(packed)]
        assert sides[0] and sides[1] and not sides[0] & sides[1]


def test_ids_are_held_out_alike_in_every_integer_type(pack_in):
    rows = _rows(40, 16)
    packed = [pack_in([row.astype(t) for row in rows], n_tokens=640) for t in (np.uint8, ">i4", np.uint64)]
    assert all(torch.equal(packed[0].token_ids, other.token_ids) for other in packed[1:])


def test_packing_is_the_same_every_time(pack_in):
    ours, again = pack_in(), pack_in(iter(DOCUMENTS))
    assert torch.equal(ours.token_ids, again.token_ids) and ours.n_train == again.n_train


def test_all_tokens_asked_for_are_taken_up_to_whole_contexts(pack_in):
    packed = pack_in(n_tokens=1000)
    assert 1000 - 2 * 16 < packed.token_ids.numel() <= 1000
    assert packed.documents == len(pack_in(n_tokens=1000, context_length=1).document_ids.unique())


def test_empty_documents_are_passed_over(pack_in):
    empty = np.empty(0, np.int64)
    with_empty = [document for full in DOCUMENTS for document in (full, "", "  \n", empty)]
    ours, reference = pack_in(with_empty), pack_in()
    assert torch.equal(ours.token_ids, reference.token_ids)
    assert torch.equal(ours.document_ids, reference.document_ids)


def test_rows_of_token_ids_as_long_as_a_context_come_back_as_they_are(pack_in):
    rows = _rows(50, 16)
    packed = pack_in(rows, n_tokens=50 * 16)
    for share, (ids, documents) in zip((False, True), _splits(packed), strict=True):
        expected = [i for i, row in enumerate(rows) if _is_held_out(row, 0.3) == share]
        assert documents[:, 0].tolist() == documents[:, -1].tolist() == expected
        assert ids.tolist() == [rows[i].tolist() for i in expected]


def test_text_and_token_ids_keep_their_order_in_one_stream(pack_in):
    packed = pack_in(["ab", np.array([1, 2, 3]), "c"], n_tokens=8, context_length=8, held_out=0.0)
    a, b, c = (ids for ids in packed.token_ids[0, [1, 2, 7]].tolist())
    assert packed.token_ids.tolist() == [[END, a, b, 1, 2, 3, END, c]]
    assert packed.document_ids.tolist() == [[0, 0, 0, 1, 1, 1, 2, 2]]


def test_a_stream_of_ids_is_cut_into_documents_before_its_separators(pack_in, monkeypatch):
    """As nanoGPT and others write them; also where pieces of the file end inside a document."""
    parts = [[END, 1, 2], [END, 3], [END, 4, 5, 6], [END, END, 7, 8]]
    stream = TokenStream(np.array([9, 9, *(i for part in parts for i in part)]))
    documents = [np.array(ids) for ids in ([9, 9], *parts[:3], [END], [END, 7, 8])]
    expected = pack_in(documents, n_tokens=15, context_length=3, held_out=0.0)
    for at_once in (1, 2, 5, 100):
        monkeypatch.setattr(packing, "_AT_ONCE", at_once)
        packed = pack_in([stream], n_tokens=15, context_length=3, held_out=0.0)
        assert torch.equal(packed.token_ids, expected.token_ids)
        assert torch.equal(packed.document_ids, expected.document_ids)


def test_every_context_begins_with_one_begin_token(pack_in):
    documents = [np.array([1, 2, 3, 4]), np.array([END, 5, 6, 7]), np.array([8, 9, END, 10])]
    packed = pack_in(documents, n_tokens=12, context_length=4, held_out=0.0, bos_in_every_context=True)
    # The second context needs a begin token and ends in the middle of the second document; the third too.
    assert packed.token_ids.tolist() == [[END, 1, 2, 3], [END, 4, END, 5], [END, 6, 7, 8], [END, 9, END, 10]]
    assert packed.document_ids.tolist() == [[0, 0, 0, 0], [0, 0, 1, 1], [1, 1, 1, 2], [2, 2, 2, 2]]


def test_context_that_begins_with_the_begin_token_gets_no_second_one(pack_in):
    documents = [np.array([END, 1, 2, 3])] * 2 + [np.array([4, 5, 6])]
    packed = pack_in(documents, n_tokens=11, context_length=4, held_out=0.0, bos_in_every_context=True)
    assert packed.token_ids.tolist() == [[END, 1, 2, 3], [END, 1, 2, 3], [END, 4, 5, 6]]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"exclude_first_position": True}, [[0, 1, 1, 1], [0, 1, 1, 1]]),
        ({"exclude_special_tokens": True}, [[1, 1, 0, 1], [1, 1, 1, 0]]),
        ({"exclude_special_tokens": True, "exclude_first_position": True}, [[0, 1, 0, 1], [0, 1, 1, 0]]),
    ],
)
def test_rows_excluded_are_those_of_first_positions_and_special_tokens(pack_in, flags, expected):
    documents = [np.array([1, 2, END, 3]), np.array([4, 5, 6, END])]
    packed = pack_in(documents, n_tokens=8, context_length=4, held_out=0.0, **flags)
    assert packed.cached.dtype == torch.bool and packed.cached.int().tolist() == expected
    assert packed.token_ids.tolist() == [document.tolist() for document in documents]


def test_begin_tokens_that_are_added_are_excluded_as_special_tokens(pack_in):
    documents = [np.array([1, 2, 3, 4])]
    packed = pack_in(
        documents,
        n_tokens=4,
        context_length=3,
        held_out=0.0,
        bos_in_every_context=True,
        exclude_special_tokens=True,
    )
    assert packed.cached.int().tolist() == [[0, 1, 1], [0, 1, 1]]


_DOCUMENT = st.one_of(
    st.text(alphabet="abc ", max_size=9),
    st.lists(st.sampled_from([0, 1, END]), max_size=9).map(lambda ids: np.array(ids, dtype=np.int64)),
)


def _laid_out(documents, tokenizer, n_tokens, share):
    """The streams of the two splits, as (token, number of its document)."""
    kept = [d for d in documents if (d.strip() if isinstance(d, str) else d.size)]
    tokens = [[END, *tokenizer(d)["input_ids"]] if isinstance(d, str) else d.tolist() for d in kept]
    laid = [(int(t), i) for i, ids in enumerate(tokens) for t in ids][:n_tokens]
    return [[(t, i) for t, i in laid if _is_held_out(kept[i], share) == side] for side in (False, True)]


def _contexts(stream, context_length, bos):
    """The contexts of a stream, one by one: each takes what fits of it, after a begin token or not."""
    position = 0
    while position < len(stream):
        token, number = stream[position]
        added = [(END, number)] if bos and token != END else []
        part = stream[position : position + context_length - len(added)]
        position += len(part)
        if len(added + part) == context_length:
            yield added + part


@settings(max_examples=60, deadline=None)
@given(
    documents=st.lists(_DOCUMENT, min_size=1, max_size=25),
    context_length=st.integers(2, 7),
    bos=st.booleans(),
    exclude_first=st.booleans(),
    exclude_special=st.booleans(),
    share=st.sampled_from([0.0, 0.3]),
    at_once=st.sampled_from([(1, 1), (3, 5), (32, 2**20)]),
    cut_off=st.integers(0, 6),
)
def test_contexts_are_cut_from_the_stream_of_their_split_however_much_is_read_at_once(
    byte_tokenizer, documents, context_length, bos, exclude_first, exclude_special, share, at_once, cut_off
):
    n_tokens = max(1, sum(map(len, _laid_out(documents, byte_tokenizer, None, share))) - cut_off)
    streams = _laid_out(documents, byte_tokenizer, n_tokens, share)
    expected = [list(_contexts(stream, context_length, bos)) for stream in streams]
    cached = [
        [
            [
                not (i == 0 and exclude_first) and not (t == END and exclude_special)
                for i, (t, _) in enumerate(c)
            ]
        ]
        for c in (context for split in expected for context in split)
    ]
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_TOKENIZED_AT_ONCE", at_once[0])
        patch.setattr(packing, "_AT_ONCE", at_once[1])
        try:
            packed = pack(
                documents,
                byte_tokenizer,
                n_tokens=n_tokens,
                context_length=context_length,
                held_out=share,
                bos_in_every_context=bos,
                exclude_first_position=exclude_first,
                exclude_special_tokens=exclude_special,
                folder=Path(folder),
            )
        except InputError:
            n_train = len(expected[0])
            splits = [cached[:n_train], cached[n_train:]][: 2 if share else 1]
            assert any(not np.any(rows) for rows in splits)
            return
    both = np.array(expected[0] + expected[1])
    assert packed.n_train == len(expected[0])
    assert np.array_equal(packed.token_ids, both[..., 0])
    assert np.array_equal(packed.document_ids, both[..., 1])
    if exclude_first or exclude_special:
        assert np.array_equal(packed.cached, np.concatenate(cached))
    else:
        assert packed.cached is None


def test_memory_does_not_grow_with_the_tokens(pack_in, monkeypatch):
    monkeypatch.setattr(packing, "_AT_ONCE", 4096)
    generator = np.random.default_rng(0)
    documents = (generator.integers(0, 256, 5000) for _ in range(400))
    tracemalloc.start()
    packed = pack_in(
        documents,
        n_tokens=1_000_000,
        context_length=32,
        bos_in_every_context=True,
        exclude_special_tokens=True,
    )
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert packed.token_ids.numel() > 1_000_000 and peak < 1_000_000  # the tokens alone have 4 MB


def test_one_long_document_of_token_ids_is_not_copied_whole(pack_in, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "_AT_ONCE", 4096)
    long = np.memmap(tmp_path / "long", np.uint16, "w+", shape=(2_000_000,))
    tracemalloc.start()
    packed = pack_in([long], n_tokens=1_500_000, context_length=50, held_out=0.0)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert packed.token_ids.shape == (30_000, 50) and peak < 1_000_000


@pytest.mark.parametrize("removed", [True, False])
def test_files_are_temporary_and_may_go_or_be_made_anew_while_the_tensors_stay(
    byte_tokenizer, tmp_path, removed
):
    sizes = {"n_tokens": 1200, "context_length": 16, "held_out": 0.3, "exclude_first_position": True}
    packed = pack(DOCUMENTS, byte_tokenizer, **sizes, folder=tmp_path)
    files = list(tmp_path.iterdir())
    assert {file.name for file in files} == {f"contexts.{c}.tmp" for c in ("tokens", "documents", "cached")}
    before = packed.token_ids.clone()
    for file in files if removed else []:
        file.unlink()
    again = pack(DOCUMENTS[::-1], byte_tokenizer, **sizes, folder=tmp_path)
    assert torch.equal(packed.token_ids, before) and not torch.equal(again.token_ids[:5], before[:5])


@pytest.mark.parametrize("documents", [[], ["", " \n ", np.empty(0, np.int32)]])
def test_empty_text_is_an_error(pack_in, documents):
    with pytest.raises(InputError, match="holds no text"):
        pack_in(documents)


def test_too_little_text_is_an_error_that_says_how_much_there_was(pack_in, tmp_path):
    total = sum(len(text) + 1 for text in DOCUMENTS)
    with pytest.raises(InputError, match=rf"`n_tokens`=5,000 asked .* only {total:,} tokens in 60 documents"):
        pack_in(n_tokens=5000)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_split_without_a_context_is_an_error(pack_in, tmp_path):
    with pytest.raises(InputError, match="held_out split got .* less than one context of 512"):
        pack_in(context_length=512, held_out=0.05)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    with pytest.raises(InputError, match=r"got 0 tokens of 0 documents.*a 1-D array .* is one document"):
        pack_in([np.arange(200)], n_tokens=200)


def test_a_stream_without_separators_is_cut_into_pieces(pack_in, monkeypatch):
    monkeypatch.setattr(packing, "_PIECE", 40)
    packed = pack_in([TokenStream(np.arange(4000) % 200)], n_tokens=4000, context_length=8)
    assert packed.documents == 100 and 0 < packed.n_train < len(packed.token_ids)


@pytest.mark.parametrize("bad", [-1, 300, 2**40])
def test_ids_that_the_model_does_not_embed_are_an_error_that_names_document_and_id(pack_in, bad):
    documents = [np.array([1, 2]), np.array([3, bad, 4])]
    with pytest.raises(InputError, match=f"document 1 has token {bad}, .* only 0 to 299.* another tokenizer"):
        pack_in(documents, n_tokens=5, vocabulary=300)


def test_ids_that_do_not_fit_the_files_are_an_error_without_a_vocabulary(pack_in):
    with pytest.raises(InputError, match="document 0 has token 4294967296"):
        pack_in([np.array([2**32])], n_tokens=1)


@pytest.mark.parametrize("flags", [{}, {"bos_in_every_context": True}])
def test_tokenizer_that_is_none_of_the_models_is_an_error(pack_in, flags):
    with pytest.raises(InputError, match="its tokenizer gives token 256, .* only 0 to 255; .*not a pair"):
        pack_in(vocabulary=256, **flags)
    if flags:  # text or not
        with pytest.raises(InputError, match="not a pair"):
            pack_in([np.array([1, 2])], vocabulary=256, **flags)


def test_split_without_a_row_to_cache_is_an_error(pack_in):
    documents = [np.array([END, END])] * 2
    with pytest.raises(InputError, match="train split has 2 contexts, but no row that .* leave to cache"):
        pack_in(documents, n_tokens=4, context_length=2, held_out=0.0, exclude_special_tokens=True)


@pytest.mark.parametrize("flag", ["bos_in_every_context", "exclude_first_position"])
def test_contexts_of_one_token_are_an_error_where_nothing_would_be_left(pack_in, flag):
    with pytest.raises(InputError, match=f"`{flag}` needs a `context_length` of at least 2"):
        pack_in(context_length=1, **{flag: True})
