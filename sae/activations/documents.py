"""Where text comes from: the built-in text, local files, or a data set of the Hugging Face hub."""

from __future__ import annotations

import glob
import itertools
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sae.activations.demo_text import demo_documents
from sae.activations.hub import is_hub_id, reason, why_out_of_reach
from sae.errors import InputError


class TokenStream(NamedTuple):
    """The token ids of many documents laid end to end, each behind a separator token."""

    ids: np.ndarray


Document = str | np.ndarray | TokenStream
"""Text, the token ids of one (a 1-D array of integers), or those of many."""
SUFFIXES = (".txt", ".jsonl", ".parquet", ".npy", ".safetensors")
ID_COLUMNS = ("input_ids", "tokens")
COLUMNS = ("text", *ID_COLUMNS)  # the first that is there counts
ID_TENSORS = ("token_ids", "input_ids")
DOCUMENT_END = "<|endoftext|>"
SHORTEST_CUT = 2_000  # characters
ROWS_AT_ONCE = 1024  # of a .parquet file
_WANTED = "a `text` string, or `input_ids` or `tokens` of integers"


def read_documents(dataset: str) -> Iterator[Document]:
    """The documents of a data set, in a fixed order, read one at a time, the first one at once.

    So a text that cannot be had is found before a language model is loaded for it. Arrays of token ids
    are views of the mapped file wherever the format allows: a long one is not read as a whole.

    Args:
        dataset: `demo`; or a local file, or a glob of them; or the id of a Hugging Face data set,
            streamed (`id` or `id:config`, split `train`). In a .txt file lines of `<|endoftext|>`
            separate documents; a file without them is cut at blank lines into documents of at least
            2,000 characters. .jsonl, .parquet and data sets of the hub have a `text` column, or for
            text that is tokenised already `input_ids` or `tokens`, a list of integers per document. A
            .npy array, or the tensor `token_ids` or `input_ids` of a .safetensors file, holds token ids:
            a document per row where it has two dimensions, one document where it has one.

    Raises:
        InputError: if there is nothing to read; in the course of reading, if a file cannot be read.
    """
    documents = _open(dataset)
    first = list(itertools.islice(documents, 1))
    return itertools.chain(first, documents)


def _open(dataset: str) -> Iterator[Document]:
    if dataset == "demo":
        return (document.text for document in demo_documents("demo"))
    # A file may have a name that looks like a pattern.
    names = [dataset] if Path(dataset).is_file() else glob.glob(dataset, recursive=True)
    paths = sorted(map(Path, names))
    if paths:
        return _read_files(paths)
    if dataset.endswith(SUFFIXES) or dataset.startswith(("/", "./", "../", "~")) or "*" in dataset:
        raise InputError(f"`dataset`: no file matches {dataset!r}; give a path that exists, or `demo`.")
    return _stream_from_hub(dataset)


def _read_files(paths: list[Path]) -> Iterator[Document]:
    readers = {
        ".txt": _split_text,
        ".jsonl": _read_jsonl,
        ".parquet": _read_parquet,
        ".npy": _read_npy,
        ".safetensors": _read_safetensors,
    }
    for path in paths:
        if path.suffix not in readers:
            raise InputError(f"`dataset`: {path} is not one of {', '.join(SUFFIXES)}.")
        try:
            yield from readers[path.suffix](path)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"`dataset`: {path} could not be read: {error}.") from error


def _split_text(path: Path) -> Iterator[str]:
    """Documents of a plain text file, line by line, so that it may be larger than memory."""
    with path.open(encoding="utf-8") as lines:
        marked = any(line.strip() == DOCUMENT_END for line in lines)
    document: list[str] = []
    length = 0
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            stripped = line.strip()
            if (stripped == DOCUMENT_END) if marked else (not stripped and length >= SHORTEST_CUT):
                yield "".join(document).strip()
                document, length = [], 0
            else:
                document.append(line)
                length += len(line)
    yield "".join(document).strip()


def _read_jsonl(path: Path) -> Iterator[Document]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield _document_of(json.loads(line))
            except (json.JSONDecodeError, TypeError) as error:
                raise InputError(
                    f"`dataset`: line {number} of {path} is not an object with {_WANTED} ({error})."
                ) from error


def _read_parquet(path: Path) -> Iterator[Document]:
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        column = next((name for name in COLUMNS if name in names), None)
        if column is None:
            raise TypeError(_columns_found(names))
        batches = file.iter_batches(ROWS_AT_ONCE, columns=[column])
        values = itertools.chain.from_iterable(batch.column(0) for batch in batches)
        for number, value in enumerate(values, start=1):
            try:
                document = _document_of({column: _from_arrow(value)})
            except TypeError as error:
                raise TypeError(f"row {number:,}: {error}") from error
            yield document
    except (pyarrow.ArrowException, TypeError) as error:
        raise InputError(f"`dataset`: {path} has no readable column of {_WANTED} ({error}).") from error


def _from_arrow(value: Any) -> Any:
    values = getattr(value, "values", None)  # of a list: an array, without making Python integers
    return value.as_py() if values is None else values.to_numpy(zero_copy_only=False)


def _read_npy(path: Path) -> Iterator[Document]:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise InputError(f"`dataset`: {path} is no .npy array of numbers ({error}).") from error
    return _documents_of(np.asarray(array), f"the array of {path}")


def _read_safetensors(path: Path) -> Iterator[Document]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            name = next((name for name in ID_TENSORS if name in names), None)
            if name is None:
                raise InputError(
                    f"`dataset`: {path} has no tensor `token_ids` or `input_ids`, but"
                    f" {', '.join(names)[:80] or 'none'}."
                )
            tensor = file.get_tensor(name)  # a view of the mapped file
    except SafetensorError as error:
        raise InputError(f"`dataset`: {path} is no readable .safetensors file ({error}).") from error
    where = f"`{name}` of {path}"
    if tensor.is_floating_point() or tensor.is_complex():  # numpy lacks some of these types
        raise _no_token_ids(where, tensor.ndim, str(tensor.dtype).removeprefix("torch."))
    return _documents_of(tensor.numpy(), where)


def _documents_of(array: np.ndarray, where: str) -> Iterator[Document]:
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
        raise _no_token_ids(where, array.ndim, array.dtype.name)
    return iter(array) if array.ndim == 2 else iter([TokenStream(array)])


def _no_token_ids(where: str, ndim: int, dtype: str) -> InputError:
    return InputError(
        f"`dataset`: {where} must be token ids, integers of one or two dimensions; it has {ndim} dimensions"
        f" of {dtype}."
    )


def _stream_from_hub(dataset: str) -> Iterator[Document]:
    from datasets import load_dataset

    name, _, config = dataset.partition(":")
    number = 0
    try:
        why = why_out_of_reach(name, "dataset") if is_hub_id(name) else "there is no such file"
        if why is not None:
            raise _cannot_read(dataset, why)
        rows = load_dataset(name, config or None, split="train", streaming=True)
        for number, row in enumerate(rows, start=1):
            try:
                document = _document_of(row)
            except TypeError as error:
                raise _cannot_read(dataset, f"row {number:,} has not {_WANTED} ({error})") from error
            yield document
    except InputError:
        raise
    except Exception as error:  # the hub's client raises dozens of kinds; all end the reading
        raise _cannot_read(dataset, reason(error, name, "dataset")) from error


def _cannot_read(dataset: str, why: str) -> InputError:
    return InputError(
        f"`dataset` {dataset!r} could not be read: {why}. Give local {', '.join(SUFFIXES)} files"
        " (--data.source.dataset 'texts/*.jsonl'), `demo`, or another Hugging Face id."
    )


def _document_of(row: Any) -> Document:
    """The document of a row of a table; raises `TypeError` that says what was found in its place."""
    if not isinstance(row, Mapping):
        raise TypeError(f"it is a {type(row).__name__}")
    if "text" in row:
        return _text_of(row["text"])
    for name in ID_COLUMNS:
        if name in row:
            return _ids_of(row[name], name)
    raise TypeError(_columns_found(list(row)))


def _columns_found(names: list[str]) -> str:
    return f"it has {', '.join(names)[:80]}" if names else "it has nothing"


def _text_of(text: Any) -> str:
    """A missing value counts as empty, halves of surrogate pairs are replaced."""
    if text is None:
        return ""
    if not isinstance(text, str):
        raise TypeError(f"`text` is {type(text).__name__}")
    return text.encode("utf-8", "replace").decode()


def _ids_of(values: Any, name: str) -> np.ndarray:
    """A list of integers as an array; a missing one counts as empty."""
    try:
        ids = np.asarray([] if values is None else values)
    except ValueError as error:  # lists of different lengths
        raise TypeError(f"`{name}` is not one list of integers") from error
    if ids.size == 0:
        return np.empty(0, np.int32)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        kinds = {"U": "strings", "f": "fractions or gaps", "O": "mixed values", "b": "booleans"}
        raise TypeError(f"`{name}` has {ids.ndim} dimensions of {kinds.get(ids.dtype.kind, ids.dtype.name)}")
    return ids
