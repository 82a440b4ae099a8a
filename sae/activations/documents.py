"""Where text comes from: the built-in text, local files, or a data set of the Hugging Face hub."""

from __future__ import annotations

import glob
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sae.activations.demo_text import demo_documents
from sae.activations.hub import is_hub_id, reason, why_out_of_reach
from sae.errors import InputError

TEXT_SUFFIXES = (".txt", ".jsonl", ".parquet")
DOCUMENT_END = "<|endoftext|>"
SHORTEST_CUT = 2_000  # characters


def read_documents(dataset: str) -> Iterator[str]:
    """The documents of a data set, in a fixed order, read one at a time, the first one at once.

    So a text that cannot be had is found before a language model is loaded for it.

    Args:
        dataset: `demo`; or a local .txt, .jsonl or .parquet file, or a glob of them; or the id of a
            Hugging Face data set, streamed (`id` or `id:config`, split `train`). In a .txt file lines
            of `<|endoftext|>` separate documents; a file without them is cut at blank lines into
            documents of at least 2,000 characters. .jsonl and .parquet have a `text` column.

    Raises:
        InputError: if there is nothing to read; in the course of reading, if a file cannot be read.
    """
    documents = _open(dataset)
    first = list(itertools.islice(documents, 1))
    return itertools.chain(first, documents)


def _open(dataset: str) -> Iterator[str]:
    if dataset == "demo":
        return (document.text for document in demo_documents("demo"))
    paths = sorted(Path(name) for name in glob.glob(dataset, recursive=True))
    if paths:
        return _read_files(paths)
    if dataset.endswith(TEXT_SUFFIXES) or dataset.startswith(("/", "./", "../", "~")) or "*" in dataset:
        raise InputError(f"`dataset`: no file matches {dataset!r}; give a path that exists, or `demo`.")
    return _stream_from_hub(dataset)


def _read_files(paths: list[Path]) -> Iterator[str]:
    for path in paths:
        if path.suffix not in TEXT_SUFFIXES:
            raise InputError(f"`dataset`: {path} is not one of {', '.join(TEXT_SUFFIXES)}.")
        try:
            if path.suffix == ".txt":
                yield from _split_text(path)
            elif path.suffix == ".jsonl":
                yield from _read_jsonl(path)
            else:
                yield from _read_parquet(path)
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


def _read_jsonl(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield _text_of(json.loads(line))
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                raise InputError(
                    f"`dataset`: line {number} of {path} is not an object with a `text` string ({error})."
                ) from error


def _read_parquet(path: Path) -> Iterator[str]:
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(columns=["text"]):
            yield from map(_text_of, batch.to_pylist())
    except (pyarrow.ArrowException, KeyError, TypeError) as error:
        raise InputError(f"`dataset`: {path} has no readable `text` column ({error}).") from error


def _stream_from_hub(dataset: str) -> Iterator[str]:
    from datasets import load_dataset

    name, _, config = dataset.partition(":")
    try:
        why = why_out_of_reach(name, "dataset") if is_hub_id(name) else "there is no such file"
        if why is not None:
            raise _cannot_read(dataset, why)
        for row in load_dataset(name, config or None, split="train", streaming=True):
            if "text" not in row:
                raise _cannot_read(dataset, f"it has no `text` column, but {', '.join(row)[:80]}")
            yield _text_of(row)
    except InputError:
        raise
    except Exception as error:  # the hub's client raises dozens of kinds; all end the reading
        raise _cannot_read(dataset, reason(error, name, "dataset")) from error


def _cannot_read(dataset: str, why: str) -> InputError:
    return InputError(
        f"`dataset` {dataset!r} could not be read: {why}. Give local .txt, .jsonl or .parquet files"
        " (--data.source.dataset 'texts/*.jsonl'), `demo`, or another Hugging Face id."
    )


def _text_of(row: dict[str, Any]) -> str:
    """The `text` of a row: a missing value counts as empty, halves of surrogate pairs are replaced."""
    text = row["text"]
    if text is None:
        return ""
    if not isinstance(text, str):
        raise TypeError(f"`text` is {type(text).__name__}")
    return text.encode("utf-8", "replace").decode()
