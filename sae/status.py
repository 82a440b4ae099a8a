"""Many runs in one table, from the small files that they leave: no torch, so it is there at once."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sae.errors import InputError
from sae.run_lock import read_lock

LEVELS = 5
"""Folders below a given one that are searched."""
NO_RUNS = {"checkpoints", "tensorboard", "dictionary", "dictionaries", "report", "caches"}
WIDTH = 120  # characters of a line
METRICS = ("fvu", "l0", "dead_fraction")


@dataclass
class Row:
    """One run, as far as its files tell."""

    name: str
    state: str
    """starting, running, finished, stopped, failed or dead; `?` where the files do not tell."""
    step: int | None = None
    max_steps: int | None = None
    steps_per_s: float | None = None
    tokens_per_s: float | None = None
    left_s: float | None = None
    data_wait: float | None = None
    """Share of the time, 0 to 1."""
    memory_bytes: int | None = None
    train: dict[str, float | None] = field(default_factory=dict)
    held_out: dict[str, float | None] = field(default_factory=dict)
    age_s: float | None = None
    """Seconds since the last sign of life."""
    owner: str | None = None
    notes: list[str] = field(default_factory=list)
    """Why it stopped, and what is wrong with its files."""


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """Folders with a config.yaml, in and below the given ones; not within a run.

    Raises:
        InputError: if one of the given folders does not exist.
    """
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder} is not a folder; give one that holds runs, e.g. runs/.")
    found = dict.fromkeys(run for folder in folders for run in _runs_below(folder, LEVELS))
    return sorted(found)


def _runs_below(folder: Path, levels: int) -> Iterator[Path]:
    if (folder / "config.yaml").is_file():
        yield folder
        return
    if levels == 0:
        return
    try:
        below = [e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith(".")]
    except OSError:  # not ours to read, or just removed
        return
    for name in below:
        if name not in NO_RUNS:
            yield from _runs_below(folder / name, levels - 1)


def read_row(folder: Path, name: str | None = None) -> Row:
    """What the files of a run tell; broken and missing ones become notes.

    Args:
        folder: the run folder.
        name: what to call it; None = the folder's own name.
    """
    notes: list[str] = []
    progress = _read(folder / "progress.json", notes)
    scores = _read(folder / "metrics.json", notes)
    owner = read_lock(folder)
    alive = owner is not None and owner.alive
    row = Row(name or folder.name, _state(progress, scores, alive, owner is not None), notes=notes)
    if alive and progress.get("state") in ("stopped", "failed", "finished"):
        began = owner.since if owner else None
        if began is not None and began > (_number(progress.get("time")) or 0):
            row.state, progress = "starting", {}  # the same command again; this was its last session's
    if row.state != "finished" and isinstance(progress.get("why"), str):
        notes.insert(0, progress["why"])
    row.owner = str(owner) if owner is not None and alive else None
    row.step = _whole(progress.get("step"), scores.get("steps"))
    row.max_steps = _whole(progress.get("max_steps"))
    if row.max_steps is None:
        row.max_steps = _configured_steps(folder / "config.yaml", notes)
    row.steps_per_s = _number(progress.get("steps_per_s"))
    row.tokens_per_s = _number(progress.get("tokens_per_s"), scores.get("tokens_per_s"))
    row.data_wait, row.memory_bytes = _number(progress.get("data_wait")), _whole(progress.get("memory_bytes"))
    if row.state in ("starting", "running") and row.steps_per_s and None not in (row.step, row.max_steps):
        row.left_s = max(0, (row.max_steps or 0) - (row.step or 0)) / row.steps_per_s
    metrics = progress.get("metrics")
    metrics = metrics if isinstance(metrics, dict) else {}
    for key in METRICS:
        row.train[key] = _number(metrics.get(f"train/{key}"), *_mean(metrics, "train", key))
        row.held_out[key] = _number(metrics.get(f"val/{key}"), scores.get(key), *_mean(metrics, "val", key))
    names = _dictionaries(metrics)
    if names:
        notes.append(f"means over the dictionaries {', '.join(names)}")
    beat = owner.age_s if owner is not None else None
    row.age_s = _age(folder, beat)
    return row


def _dictionaries(metrics: dict[str, Any]) -> list[str]:
    """Names of the dictionaries of a run that trains several, by its curves: train/<name>/fvu."""
    parts = [name.split("/") for name in metrics if isinstance(name, str)]
    found = [part[1] for part in parts if len(part) == 3 and part[0] in ("train", "val") and part[2] == "fvu"]
    return sorted(dict.fromkeys(found))


def _mean(metrics: dict[str, Any], stage: str, key: str) -> list[float]:
    """Mean of a quantity over the dictionaries of a run; nothing where not all of them have it."""
    names = _dictionaries(metrics)
    values = [_number(metrics.get(f"{stage}/{name}/{key}")) for name in names]
    known = [value for value in values if value is not None]
    return [sum(known) / len(known)] if known and len(known) == len(names) else []


def _state(progress: dict[str, Any], scores: dict[str, Any], alive: bool, locked: bool) -> str:
    said = progress.get("state")
    if said in ("starting", "running"):
        if alive:
            return said
        # Killed after its last score was written, it has nothing left to do.
        steps, end = _whole(scores.get("steps")), _whole(progress.get("max_steps"))
        done = scores.get("finished") is True and None not in (steps, end) and (steps or 0) >= (end or 0)
        return "finished" if done else "dead"
    if said in ("stopped", "failed", "finished"):
        return said
    if alive:  # from here on, there is no word of its own
        return "running"
    if scores.get("finished") is True:
        return "finished"
    return "dead" if locked else "stopped" if scores.get("finished") is False else "?"


def _read(path: Path, notes: list[str]) -> dict[str, Any]:
    """The object in a JSON file; empty where there is none, or none that can be read."""
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        notes.append(f"{path.name} cannot be read: {' '.join(str(error).split())}")
        return {}
    if not isinstance(found, dict):
        notes.append(f"{path.name} holds {type(found).__name__}, not what a run writes")
        return {}
    return found


def _configured_steps(path: Path, notes: list[str]) -> int | None:
    try:
        config = yaml.safe_load(path.read_bytes())
        return _whole(config["trainer"]["max_steps"])
    except (OSError, yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        notes.append(f"{path.name} cannot be read: {' '.join(str(error).split())}")
    except (KeyError, TypeError):
        notes.append(f"{path.name} is not the configuration of a run")
    return None


def _age(folder: Path, beat: float | None) -> float | None:
    """Seconds since the heartbeat or the last write, whichever is later."""
    ages = [] if beat is None else [beat]
    for name in ("progress.json", "metrics.json", "config.yaml"):
        try:
            ages.append(max(0.0, time.time() - (folder / name).stat().st_mtime))
        except OSError:
            continue
    return min(ages) if ages else None


def _number(*values: Any) -> float | None:
    """The first that is a number, and neither NaN nor beyond reason."""
    for value in values:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300:
            return float(value)
    return None


def _whole(*values: Any) -> int | None:
    number = _number(*values)
    return None if number is None else int(number)


def rows_of(folders: Sequence[Path]) -> list[Row]:
    """A row for every run, named by its path without what all of them share.

    Raises:
        InputError: as `find_runs`.
    """
    runs = find_runs(folders)
    parents = {run.parent for run in runs}
    common = Path(os.path.commonpath([p.absolute() for p in parents])) if parents else Path()
    return [read_row(run, str(run.absolute().relative_to(common))) for run in runs]


def as_json(rows: Sequence[Row]) -> str:
    """The rows as a JSON list."""
    return json.dumps([asdict(row) for row in rows], indent=2)


TITLES = (
    "run",
    "state",
    "step",
    "rate",
    "left",
    "FVU",
    "L0",
    "dead",
    "val FVU",
    "val L0",
    "val dead",
    "seen",
)


def table(rows: Sequence[Row], width: int = WIDTH) -> str:
    """Aligned columns, at most `width` characters wide; what is to be said of a run stands below its line."""
    if not rows:
        return "no runs here (a run folder has a config.yaml)"
    cells = [list(TITLES), *(_cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(TITLES))]
    widths[0] = max(8, min(widths[0], width - sum(widths[1:]) - 2 * (len(widths) - 1)))
    lines = []
    for number, line in enumerate(cells):
        line[0] = _shorten(line[0], widths[0])
        left = [f"{text:<{w}}" for text, w in zip(line[:2], widths[:2], strict=True)]
        right = [f"{text:>{w}}" for text, w in zip(line[2:], widths[2:], strict=True)]
        lines.append("  ".join([*left, *right]).rstrip())
        if number:
            lines += ["    " + _cut(note, width - 4) for note in rows[number - 1].notes]
    return "\n".join(lines)


def _cells(row: Row) -> list[str]:
    if row.tokens_per_s is not None:
        rate = f"{_short(row.tokens_per_s)} tok/s"
    else:
        rate = "-" if row.steps_per_s is None else f"{row.steps_per_s:.3g} st/s"
    steps = "-" if row.step is None else f"{row.step:,}"
    if row.max_steps is not None and row.max_steps >= 0:
        steps += f"/{row.max_steps:,}"
    forms = dict(zip(METRICS, (".4f", ".4g", ".1%"), strict=True))
    scores = [
        _form(values.get(key), form) for values in (row.train, row.held_out) for key, form in forms.items()
    ]
    return [row.name, row.state, steps, rate, _span(row.left_s), *scores, _span(row.age_s)]


def _form(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _short(value: float) -> str:
    """E.g. 1.23M."""
    for unit in ("", "k", "M"):
        if abs(value) < 999.5:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g}G"


def _span(seconds: float | None) -> str:
    """E.g. 42s, 3m05, 2h10, 4d03."""
    if seconds is None:
        return "-"
    whole = int(seconds)
    if whole < 60:
        return f"{whole}s"
    for size, unit, part in ((3600, "m", 60), (86_400, "h", 3600)):
        if whole < size:
            return f"{whole // part}{unit}{whole % part * 60 // part:02d}"
    return f"{whole // 86_400}d{whole % 86_400 // 3600:02d}"


def _shorten(name: str, width: int) -> str:
    """Keeps the end of a name, where runs of one sweep differ, and a little of its beginning."""
    if len(name) <= width:
        return name
    head = width // 4
    return f"{name[:head]}…{name[len(name) - (width - head - 1) :]}"


def _cut(text: str, width: int) -> str:
    text = " ".join(text.split())
    return text if len(text) <= width else text[: width - 1] + "…"
