"""Reading text: formats, document boundaries, errors."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from sae.activations.demo_text import demo_documents, split_of
from sae.activations.documents import read_documents
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


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"body": "y"}', "line 2 of .* is not an object with a `text` string"),
        ("a.jsonl", b"not json", "line 1 of"),
        ("a.txt", b"\xff\xfe\x00\x01", "could not be read"),
        ("a.parquet", b"nonsense", "no readable `text` column"),
        ("a.csv", b"text\n1", "is not one of .txt, .jsonl, .parquet"),
    ],
)
def test_unreadable_files_are_errors_that_name_them(tmp_path, name, content, match):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=match):
        list(read_documents(str(tmp_path / name)))


def test_missing_file_is_an_error(tmp_path):
    with pytest.raises(InputError, match="no file matches"):
        read_documents(str(tmp_path / "none.txt"))


def test_data_set_that_cannot_be_reached_is_one_clear_error():
    with pytest.raises(InputError, match="could not be read: it is not in the Hugging Face cache"):
        read_documents("nobody/such-a-data-set")


def test_data_set_of_the_hub_without_texts_is_an_error_that_names_its_columns(monkeypatch):
    import datasets

    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: iter([{"content": "a", "n": 1}]))
    with pytest.raises(InputError, match="it has no `text` column, but content, n. Give local"):
        read_documents("owner/name")


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
