"""The built-in text: documentation, docstrings and comments of the running Python and its libraries."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import inspect
import io
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

Split = Literal["train", "demo"]

LIBRARIES = (
    "datasets",
    "einops",
    "fsspec",
    "jinja2",
    "lightning",
    "matplotlib",
    "numpy",
    "scipy",
    "sklearn",
    "tensorboard",
    "torch",
    "transformers",
)
"""Import names of the dependencies whose text is read; one that is not installed is left out."""

DEMO_SHARE = 0.12
"""Share of the documents, by name, that the demo model never saw: `dataset: demo` is made of these."""

_SKIPPED_FOLDERS = {"test", "tests", "testing", "site-packages", "lib2to3", "models", "_vendor"}
_SHORTEST_PASSAGE = 40  # characters; shorter comments are mostly debris
_SHORTEST_DOCUMENT = 400  # characters


class Document(NamedTuple):
    """One document of the built-in text."""

    name: str
    """Where it comes from, e.g. `scipy/optimize/_root.py`; the split hangs on this name alone."""
    text: str


def split_of(name: str) -> Split:
    """Side on which a document falls: a pure function of its name, the same on every machine."""
    return "demo" if _name_hash(name) < DEMO_SHARE * 2**64 else "train"


def demo_documents(split: Split) -> Iterator[Document]:
    """Yields the documents of one side, in an order (hash of the name) that mixes the libraries.

    The text depends on which versions are installed; the side of each document does not.
    Nothing is imported: source files are parsed.
    """
    sources = {name: path for name, path in _source_files() if split_of(name) == split}
    topics = {name: text for name, text in _help_topics() if split_of(name) == split}
    for name in sorted([*sources, *topics], key=_name_hash):
        text = topics[name] if name in topics else _prose_of_source(sources[name])
        if len(text) >= _SHORTEST_DOCUMENT:
            yield Document(name, text)


def _name_hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")


def _source_files() -> Iterator[tuple[str, Path]]:
    """Python files of the standard library and of the installed `LIBRARIES`, with their names."""
    roots = [("python", Path(sysconfig.get_paths()["stdlib"]))]
    for library in LIBRARIES:
        spec = importlib.util.find_spec(library)
        if spec is not None and spec.submodule_search_locations:
            roots.append((library, Path(spec.submodule_search_locations[0])))
    for label, root in roots:
        for path in sorted(root.rglob("*.py")):
            relative = path.relative_to(root)
            if not _SKIPPED_FOLDERS.intersection(relative.parts[:-1]):
                yield f"{label}/{relative.as_posix()}", path


def _help_topics() -> Iterator[tuple[str, str]]:
    """The language reference as `help()` shows it."""
    from pydoc_data import topics

    for topic, text in topics.topics.items():
        yield f"help/{topic}", text.strip()


def _prose_of_source(path: Path) -> str:
    """Docstrings under their signatures, and comment blocks, in the order of the file."""
    try:
        source = path.read_text(encoding="utf-8")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escapes
            tree = ast.parse(source)
        passages = [*_docstrings(tree), *_comment_blocks(source)]
    except (OSError, SyntaxError, ValueError, tokenize.TokenError, RecursionError):
        return ""  # not every installed file is valid for this Python (templates, other versions)
    return "\n\n".join(text for _, text in sorted(passages))


def _docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if not isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            continue
        docstring = ast.get_docstring(node)
        if not docstring or len(docstring) < _SHORTEST_PASSAGE:
            continue
        if isinstance(node, ast.Module):
            yield 0, docstring
        else:
            body = '    """' + docstring.replace("\n", "\n    ").replace("\n    \n", "\n\n") + '\n    """'
            yield node.lineno, f"{_signature(node)}\n{body}"


def _signature(node: ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        return f"class {node.name}({bases}):" if bases else f"class {node.name}:"
    returns = f" -> {ast.unparse(node.returns)}" if node.returns else ""
    return f"def {node.name}({ast.unparse(node.args)}){returns}:"


def _comment_blocks(source: str) -> Iterator[tuple[int, str]]:
    """Runs of whole-line comments, with the line each begins on."""
    block: list[str] = []
    begin = previous = -2
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type != tokenize.COMMENT or token.line.strip() != token.string:
            continue
        line = token.start[0]
        if line != previous + 1:
            yield from _long_enough(begin, block)
            begin, block = line, []
        block.append(token.string)
        previous = line
    yield from _long_enough(begin, block)


def _long_enough(line: int, block: list[str]) -> Iterator[tuple[int, str]]:
    text = inspect.cleandoc("\n".join(block))
    is_licence = "opyright" in text or "icense" in text
    if len(text) >= _SHORTEST_PASSAGE and not is_licence:
        yield line, text
