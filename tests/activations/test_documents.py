"""Reading text: formats, document boundaries, errors."""

import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import safetensors.torch
import torch

from sae.activations.demo_text import demo_documents, split_of
from sae.activations.documents import TokenStream, read_documents
from sae.errors import InputError


def test_marked_text_is_split_at_its_marks(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("one\n\nstill one\n<|endoftext|>\ntwo\n<|endoftext|>\n")
    assert [d for d in read_documents(str(path)) if d] == ["one\n\nstill one", "two"]


def test_plain_text_is_cut_at_blank_lines_after_2000_characters(tmp_path):
    paragraphs = ["word " * 250, "more " * 250, "last"]  # 1,250 characters each
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(paragraphs))
    documents = list(read_documents(str(path)))
    assert len(documents) == 2 and documents[0].count("\n\n") == 1 and documents[1] == "last"


def test_jsonl_parquet_and_globs_give_their_texts_in_order(tmp_path):
    (tmp_path / "1.jsonl").write_text("\n".join(json.dumps({"text": t, "n": 1}) for t in "ab"))
    pyarrow.parquet.write_table(pyarrow.table({"text": ["c", "d"], "n": [1, 2]}), tmp_path / "2.parquet")
    assert list(read_documents(str(tmp_path / "*"))) == ["a", "b", "c", "d"]


def test_missing_texts_are_empty_and_broken_characters_are_replaced(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": null}\n{"text": "a\\ud800b"}\n')
    assert list(read_documents(str(tmp_path / "a.jsonl"))) == ["", "a?b"]
    pyarrow.parquet.write_table(pyarrow.table({"text": ["c", None]}), tmp_path / "b.parquet")
    assert list(read_documents(str(tmp_path / "b.parquet"))) == ["c", ""]


def _write_table(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("column", ["input_ids", "tokens"])
def test_rows_of_token_ids_are_read_where_there_is_no_text(tmp_path, suffix, column):
    path = tmp_path / f"a{suffix}"
    lists = [[5, 6, 7], [], None, [8]]
    _write_table(path, [{"n": 1, column: ids} for ids in lists])
    documents = list(read_documents(str(path)))
    assert [d.tolist() for d in documents] == [[5, 6, 7], [], [], [8]]
    assert all(d.dtype.kind == "i" and d.ndim == 1 for d in documents)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_text_counts_where_a_row_has_both_text_and_tokens(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    _write_table(path, [{"tokens": [1], "text": "a", "input_ids": [2]}])
    assert list(read_documents(str(path))) == ["a"]


def test_parquet_is_read_across_its_batches(tmp_path, monkeypatch):
    monkeypatch.setattr("sae.activations.documents.ROWS_AT_ONCE", 3)
    _write_table(tmp_path / "a.parquet", [{"tokens": [i, i + 1]} for i in range(8)])
    documents = list(read_documents(str(tmp_path / "a.parquet")))
    assert [d.tolist() for d in documents] == [[i, i + 1] for i in range(8)]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_arrays_hold_a_document_per_row_or_a_stream_of_all(tmp_path, dtype):
    np.save(tmp_path / "1.npy", np.arange(6, dtype=dtype).reshape(2, 3))
    np.save(tmp_path / "2.npy", np.arange(4, dtype=dtype))
    tensors = {"other": torch.zeros(2), "token_ids": torch.from_numpy(np.arange(4, dtype=dtype))[:, None]}
    safetensors.torch.save_file(tensors, tmp_path / "3.safetensors")
    safetensors.torch.save_file({"input_ids": torch.arange(3)}, tmp_path / "4.safetensors")
    documents = list(read_documents(str(tmp_path / "*")))
    streams = [isinstance(document, TokenStream) for document in documents]
    assert streams == [False, False, True, False, False, False, False, True]
    ids = [(d.ids if isinstance(d, TokenStream) else d).tolist() for d in documents]
    assert ids == [[0, 1, 2], [3, 4, 5], [0, 1, 2, 3], [0], [1], [2], [3], [0, 1, 2]]


def test_long_arrays_are_mapped_not_read(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(100_000))
    ((document,),) = read_documents(str(tmp_path / "a.npy"))
    base = document
    while base is not None and not isinstance(base, np.memmap):
        base = base.base
    assert base is not None and len(document) == 100_000


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        (
            "a.jsonl",
            b'{"text": "x"}\n{"body": "y", "n": 1}',
            r"line 2 of .*a.jsonl is not an object with a `text` string, .*\(it has body, n\)",
        ),
        ("a.jsonl", b"not json", "line 1 of"),
        ("a.jsonl", b"[1, 2]", "it is a list"),
        ("a.jsonl", b'{"text": 5}', "`text` is int"),
        ("a.jsonl", b'{"tokens": ["a", "b"]}', "`tokens` has 1 dimensions of strings"),
        ("a.jsonl", b'{"tokens": [[1, 2]]}', "`tokens` has 2 dimensions of int64"),
        ("a.jsonl", b'{"tokens": [[1, 2], [3]]}', "`tokens` is not one list of integers"),
        ("a.jsonl", b'{"input_ids": [1, 2.5]}', "`input_ids` has 1 dimensions of fractions"),
        ("a.jsonl", b'{"input_ids": [1, null]}', "`input_ids` has 1 dimensions of mixed values"),
        ("a.jsonl", b'{"input_ids": 5}', "`input_ids` has 0 dimensions of int64"),
        ("a.txt", b"\xff\xfe\x00\x01", "could not be read"),
        ("a.parquet", b"nonsense", "a.parquet has no readable column of a `text` string"),
        ("a.npy", b"nonsense", "a.npy is no .npy array"),
        ("a.npy", b"", "a.npy is no .npy array"),
        ("a.safetensors", b"nonsense", "a.safetensors is no readable .safetensors file"),
        ("a.csv", b"text\n1", "is not one of .txt, .jsonl, .parquet, .npy, .safetensors"),
    ],
)
def test_unreadable_files_are_errors_that_name_them(tmp_path, name, content, match):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=match):
        list(read_documents(str(tmp_path / name)))


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([{"a": 1, "b": 2}], r"a.parquet has no readable column of .* \(it has a, b\)"),
        ([{"tokens": ["x"]}], "row 1: `tokens` has 1 dimensions of mixed values"),
        ([{"tokens": [1]}, {"tokens": [1, None]}], "row 2: `tokens` has 1 dimensions of fractions or gaps"),
        ([{"text": 5}], "row 1: `text` is int"),
    ],
)
def test_parquet_without_text_or_token_ids_is_an_error_that_says_what_it_has(tmp_path, rows, match):
    _write_table(tmp_path / "a.parquet", rows)
    with pytest.raises(InputError, match=match):
        list(read_documents(str(tmp_path / "a.parquet")))


@pytest.mark.parametrize(
    ("array", "match"),
    [(np.zeros((2, 3)), "2 dimensions of float64"), (np.zeros((1, 2, 3), np.int32), "3 dimensions of int32")],
)
def test_arrays_of_anything_but_rows_of_integers_are_an_error(tmp_path, array, match):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(InputError, match=f"the array of .*a.npy must be token ids, .* it has {match}"):
        read_documents(str(tmp_path / "a.npy"))
    tensor = torch.from_numpy(array)
    tensor = tensor.bfloat16() if tensor.is_floating_point() else tensor
    safetensors.torch.save_file({"token_ids": tensor}, tmp_path / "a.safetensors")
    match = match.replace("float64", "bfloat16")
    with pytest.raises(InputError, match=f"`token_ids` of .*a.safetensors must be .* it has {match}"):
        read_documents(str(tmp_path / "a.safetensors"))


def test_tensors_without_token_ids_are_an_error_that_names_them(tmp_path):
    safetensors.torch.save_file({"b": torch.zeros(1), "a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="has no tensor `token_ids` or `input_ids`, but a, b"):
        read_documents(str(tmp_path / "a.safetensors"))


def test_missing_file_is_an_error(tmp_path):
    with pytest.raises(InputError, match="no file matches"):
        read_documents(str(tmp_path / "none.txt"))


def test_data_set_that_cannot_be_reached_is_one_clear_error():
    with pytest.raises(InputError, match="could not be read: it is not in the Hugging Face cache"):
        read_documents("nobody/such-a-data-set")


def test_data_set_of_the_hub_without_texts_is_an_error_that_names_its_columns(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: iter([{"content": "a", "n": 1}]))
    with pytest.raises(
        InputError, match=r"row 1 has not a `text` string, .*\(it has content, n\). Give local"
    ):
        read_documents("owner/name")


def test_data_set_of_the_hub_may_hold_token_ids(monkeypatch):
    import datasets

    rows = [{"input_ids": [1, 2]}, {"input_ids": [3]}, {"input_ids": ["a"]}]
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: iter(rows))
    documents = read_documents("owner/name")
    assert next(documents).tolist() == [1, 2] and next(documents).tolist() == [3]
    with pytest.raises(InputError, match="row 3 has not .*`input_ids` has 1 dimensions of strings"):
        next(documents)


def test_data_set_of_the_hub_is_streamed_by_id_and_configuration(monkeypatch):
    import datasets

    asked = []

    def load_dataset(*args, **kwargs):
        asked.append((args, kwargs))
        return iter([{"text": "a"}, {"text": "b"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert list(read_documents("owner/name:part")) == ["a", "b"]
    assert asked == [(("owner/name", "part"), {"split": "train", "streaming": True})]


def test_zstandard_is_there_for_the_pile(tmp_path):
    """monology/pile-uncopyrighted is .jsonl.zst, which datasets reads only with that package."""
    import zstandard
    from datasets import load_dataset

    path = tmp_path / "00.jsonl.zst"
    path.write_bytes(zstandard.compress(json.dumps({"text": "a", "meta": {}}).encode()))
    rows = load_dataset("json", data_files=str(path), split="train", streaming=True)
    assert [row["text"] for row in rows] == ["a"]


def test_demo_text_splits_by_name_and_never_overlaps():
    names = {d.name for d, _ in zip(demo_documents("demo"), range(30), strict=False)}
    assert names and all(split_of(name) == "demo" for name in names)
    share = sum(split_of(f"library/file{i}.py") == "demo" for i in range(5000)) / 5000
    assert 0.10 < share < 0.14


def test_demo_text_is_prose_not_code():
    document = next(demo_documents("demo"))
    assert len(document.text) >= 400 and "import " not in document.text[:40]
