"""Writes the report's folder: whole or not at all, and never over what is not a report."""

from __future__ import annotations

import html
import re
import shutil
import zlib
from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from sae.errors import InputError
from sae.files import write_atomically
from sae.inspection.latent import FEWEST_FIRINGS, LatentReading
from sae.inspection.report.encoding import (
    LatentTable,
    TokenIndex,
    latent_page,
    packed,
    safe_text,
    script,
)

GENERATOR = "sae-report/1"
"""What index.html names as its generator: the mark of a folder that is ours to replace."""

LATENTS_PER_FILE = 64
"""Latents in each file that the page loads when one of them is opened."""

_HEAD_BYTES = 4096  # of index.html: generator and source stand within
_SOURCE = re.compile(r'<meta name="sae-source" content="([^"]*)">')
_HERE = Path(__file__).parent
_SCRIPTS = ("store.js", "table.js", "latent.js", "report.js")
_COLUMNS = {
    "method": "method",
    "n_latents": "directions",
    "l0": "L0",
    "fvu": "FVU",
    "ce_increase": "CE increase, nats",
    "ce_increase_se": "± s.e.",
    "ce_spliced": "CE spliced, nats",
    "kl": "KL, nats",
    "cosine": "cosine",
    "dead_fraction": "dead",
    "bits_per_token": "bits per token",
    "purity": "token purity",
    "purity_null": "purity by chance",
    "cancellation": "cancelled",
    "stability": "found again",
    "fit_s": "seconds to fit",
    "truth_f1": "F1 (chance 0, truth 1)",
    "truth_mcc": "MCC (chance 0, truth 1)",
}
_MODEL_LOSS = {"ce_clean": "as it is", "ce_mean_ablated": "with the activations replaced by their mean"}


class Grid(NamedTuple):
    """A table and a figure that belong together."""

    title: str
    caption: str
    head: list[str]
    rows: list[list[str]]
    svg: str
    """Our own: it is inserted as it is."""


class ReportFacts(NamedTuple):
    """What the report says of the run as a whole."""

    title: str
    notes: list[str]
    """What a reader must know first, e.g. that the run is unfinished; shown as a banner."""
    facts: list[tuple[str, str]]
    """What was trained, as name and value: model, hookpoint, text, tokens, kind, ..."""
    comparison: list[dict[str, Any]]
    """One row per method, keyed as metrics.json is, with `method`; None is a dash, in all rows no column."""
    model_loss: dict[str, float | None]
    """`ce_clean` and `ce_mean_ablated` in nats; empty if the model was not at hand."""
    figures: list[tuple[str, str]]
    """Caption and SVG text. The SVG is inserted as it is: it must be our own."""
    source: str = ""
    """What the report was made from, e.g. a run's folder; `report_source` reads it back."""
    tokens_scored: int | None = None
    """Held-out tokens that cross entropy was measured on."""
    geometry: tuple[Grid, ...] = ()
    """Tables and figures of how the directions lie; a page of their own."""


def report_source(folder: Path) -> str | None:
    """`source` of the report in `folder`, "" if it names none; None if there is no report of ours.

    As it stands in the page: control characters are spelled out, as `safe_text` does it.
    """
    head = _head(folder)
    if not _is_ours(head):
        return None
    found = _SOURCE.search(head)
    return html.unescape(found[1]) if found else ""


def check_report_folder(folder: Path) -> None:
    """Whether `write_report` may write to `folder`, for callers to ask before long work.

    Raises:
        InputError: if `folder`, or what lies beside it under the names that writing takes (.tmp and .old
            at the end), holds something else than a report.
    """
    for path in _places(folder):
        _require_ours(path)


def write_report(
    folder: Path,
    facts: ReportFacts,
    latents: Iterable[LatentReading],
    n_latents: int,
    text: Callable[[int], str],
) -> Path:
    """Writes `folder`/index.html and its data; a report that is there already is replaced at the end.

    Takes `latents` as they come and holds 64 of them at a time. Everything is written beside `folder`
    and moved there once it is whole, so a run that is killed leaves the old report.

    Args:
        folder: A new or empty folder, or a report.
        facts: What is said of the whole run.
        latents: What is known of each latent, by rising number.
        n_latents: How many latents the dictionary has; 0 for a report without latents, which then says
            nothing of them but what `facts` says.
        text: Shows a token id as a quoted string, e.g. `" the"`.

    Returns:
        The path of index.html.

    Raises:
        InputError: if `folder` holds something else than a report.
    """
    check_report_folder(folder)
    folder, temporary, previous = _places(folder)
    if previous.exists() and not folder.exists():
        previous.rename(folder)  # killed between the two renames of _swap
    for path in (temporary, previous):
        shutil.rmtree(path, ignore_errors=True)
    try:
        (temporary / "data").mkdir(parents=True)
        (temporary / "index.html").write_text(f'<meta name="generator" content="{GENERATOR}">unfinished')
        version = _write_data(temporary / "data", latents, n_latents, text)
        write_atomically(temporary / "index.html", _page(facts, n_latents, version).encode())
        _swap(folder, temporary, previous)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder / "index.html"


def _places(folder: Path) -> tuple[Path, Path, Path]:
    """The report's folder, the one it is written to first, and the one the old report waits in."""
    folder = folder.resolve()
    return folder, folder.with_name(folder.name + ".tmp"), folder.with_name(folder.name + ".old")


def _head(folder: Path) -> str:
    """The beginning of its index.html; empty if there is none."""
    index = folder / "index.html"
    if not index.is_file():
        return ""
    with index.open("rb") as file:
        return file.read(_HEAD_BYTES).decode("utf-8", "replace")


def _is_ours(head: str) -> bool:
    return f'content="{GENERATOR}"' in head


def _require_ours(path: Path) -> None:
    """A missing or empty folder, or a report of ours; anything else is left alone."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if _is_ours(_head(path)):
        return
    raise InputError(
        f"`folder` must be new, empty or a report written by sae, got {path}, which holds something else"
        " and is left untouched; name another folder."
    )


def _swap(folder: Path, temporary: Path, previous: Path) -> None:
    if folder.exists():
        folder.rename(previous)
    try:
        temporary.rename(folder)
    except OSError:
        if previous.exists():
            previous.rename(folder)
        raise
    shutil.rmtree(previous, ignore_errors=True)


def _write_data(
    data: Path, latents: Iterable[LatentReading], n_latents: int, text: Callable[[int], str]
) -> str:
    """Writes the data files; returns a version that changes with them, so that no browser mixes two."""
    index, table = TokenIndex(text), LatentTable()
    version = 0

    def write(name: str, content: bytes) -> None:
        nonlocal version
        version = zlib.crc32(content, version)
        write_atomically(data / name, content)

    readings = iter(latents)
    chunk = 0
    while pages := [_page_of(r, n_latents, table, index) for r in islice(readings, LATENTS_PER_FILE)]:
        write(f"latents-{chunk:05d}.js", script("latents", chunk, packed(pages)))
        chunk += 1
    limits = {"n_latents": n_latents, "per_file": LATENTS_PER_FILE, "enough_firings": FEWEST_FIRINGS}
    write("table.js", script("table", None, {**limits, "columns": table.columns}))
    write("tokens.js", script("tokens", None, index.texts))
    return f"{version:08x}"


def _page_of(reading: LatentReading, n_latents: int, table: LatentTable, index: TokenIndex) -> dict[str, Any]:
    if not 0 <= reading.latent < n_latents:
        raise InputError(
            f"`latents` must be numbered in [0, n_latents={n_latents}), got {reading.latent}; give the"
            " `n_latents` of the dictionary that was read."
        )
    table.add(reading, index)
    return latent_page(reading, index)


def _page(facts: ReportFacts, n_latents: int, version: str) -> str:
    environment = Environment(loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined)
    environment.trim_blocks = environment.lstrip_blocks = True
    known = {k for row in facts.comparison for k, value in row.items() if value is not None}
    columns = [*(k for k in _COLUMNS if k in known), *sorted(known - _COLUMNS.keys())]
    losses = [(label, facts.model_loss.get(k)) for k, label in _MODEL_LOSS.items()]
    page = environment.get_template("template.html").render(
        generator=GENERATOR,
        version=version,
        n_latents=n_latents,
        facts=facts,
        head=[_COLUMNS.get(k, k) for k in columns],
        rows=[[_cell(k, row.get(k)) for k in columns] for row in facts.comparison],
        losses=[(label, value) for label, value in losses if value is not None],
        figures=[(caption, svg[max(svg.find("<svg"), 0) :]) for caption, svg in facts.figures],
        geometry=facts.geometry,
        enough=FEWEST_FIRINGS,
        css=(_HERE / "report.css").read_text(encoding="utf-8"),
        js="\n".join((_HERE / name).read_text(encoding="utf-8") for name in _SCRIPTS),
    )
    return "\n".join(map(safe_text, page.split("\n")))


def _cell(key: str, value: Any) -> str:
    if value is None or value != value:
        return "\N{EN DASH}"
    if isinstance(value, str):
        return value
    if key in ("dead_fraction", "cancellation", "stability"):
        return f"{value:.1%}".replace("%", " %")
    if key == "l0":
        return f"{value:.2f}".rstrip("0").rstrip(".")
    if key in ("bits_per_token", "fit_s"):
        return f"{value:,.0f}"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
