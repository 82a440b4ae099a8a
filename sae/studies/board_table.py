"""A board as a table: means and standard errors over seeds, each also between chance and the truth."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from sae.ops.truth import between
from sae.studies.entries import RANDOM, TRUTH

COLUMNS = {
    "f1": "F1", "mcc": "MCC", "f1_rare": "F1 rare", "precision": "prec.", "recall": "recall",
    "mmcs": "MMCS", "uniqueness": "uniq.", "absorption": "absorb.", "hedging": "hedg.",
    "shrinkage": "slope", "fvu": "FVU", "l0": "L0", "dead_fraction": "dead",
}  # fmt: skip
NORMALISED = tuple(name for name in COLUMNS if name not in ("hedging", "l0", "dead_fraction"))
"""Scores shown between chance (0) and the truth (1) as well; of the others neither has a part in it."""
_ENOUGH = 0.9


def rows_of(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each entry, best F1 first: {"entry", "seeds", "seconds", "scores": {name: {mean, se}}}."""
    by_entry: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        by_entry.setdefault(result["entry"], []).append(result)
    rows = []
    for entry, found in by_entry.items():
        scores = {name: _mean_and_error([r["scores"][name] for r in found]) for name in found[0]["scores"]}
        seconds = round(mean(r["seconds"] for r in found), 1)
        rows.append({"entry": entry, "seeds": len(found), "seconds": seconds, "scores": scores})
    references = {row["entry"]: row["scores"] for row in rows if row["entry"] in (RANDOM, TRUTH)}
    for row in rows:
        row["normalised"] = {
            name: _between(row["scores"][name], references[RANDOM][name], references[TRUTH][name])
            for name in NORMALISED
        }
    return sorted(rows, key=lambda row: -row["scores"]["f1"]["mean"])


def markdown(title: str, rows: Sequence[dict[str, Any]]) -> str:
    """The table, with a line under it where the world itself cannot be judged by."""
    lines = [f"### {title}", ""]
    lines += _table(rows, "scores", COLUMNS)
    lines += ["", "The same between chance and the truth, (x - random) / (truth - random):", ""]
    lines += _table(rows, "normalised", NORMALISED)
    truth = next(row for row in rows if row["entry"] == TRUTH)["scores"]["f1"]["mean"]
    lines += [
        "",
        "mean ± standard error over seeds; slope: of learned on true magnitudes; s: seconds a run.",
        "Definitions: `sae/ops/truth.py`.",
    ]
    if truth < _ENOUGH:
        lines += [
            "",
            f"The true directions themselves reach an F1 of {truth:.3f} only: this board does not count.",
        ]
    return "\n".join(lines) + "\n"


def _table(rows: Sequence[dict[str, Any]], of: str, names: Iterable[str]) -> list[str]:
    names = list(names)
    heads = ["", *(COLUMNS[name] for name in names), "s"]
    lines = [" | ".join(["", *heads, ""]).strip(), "|" + " --- |" * len(heads)]
    for row in rows:
        cells = [row["entry"], *(_cell(row[of][name]) for name in names), f"{row['seconds']:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def write_hparams(folder: Path, world: str, results: Sequence[dict[str, Any]]) -> None:
    """A TensorBoard run for each result, with its entry and seed as hyperparameters; earlier ones go."""
    for result in results:
        name = f"{result['entry'].replace(' ', '_').replace('>', '_by_')}-seed{result['seed']}"
        known = {f"truth/{k}": v for k, v in result["scores"].items() if v is not None and math.isfinite(v)}
        shutil.rmtree(folder / "tensorboard" / name, ignore_errors=True)
        with SummaryWriter(str(folder / "tensorboard" / name)) as writer:
            settings = {"entry": result["entry"], "world": world, "seed": result["seed"]}
            writer.add_hparams(settings, known, run_name=".")


def _mean_and_error(values: Sequence[float | None]) -> dict[str, float | None]:
    known = [value for value in values if value is not None]
    if not known:
        return {"mean": None, "se": None}
    return {"mean": mean(known), "se": stdev(known) / len(known) ** 0.5 if len(known) > 1 else None}


def _between(x: dict[str, Any], floor: dict[str, Any], ceiling: dict[str, Any]) -> dict[str, float | None]:
    at = between(x["mean"], floor["mean"], ceiling["mean"])
    if at is None or x["se"] is None:
        return {"mean": at, "se": None}
    return {"mean": at, "se": x["se"] / abs(ceiling["mean"] - floor["mean"])}


def _cell(value: dict[str, float | None]) -> str:
    if value["mean"] is None:
        return "–"
    digits = 2 if abs(value["mean"]) >= 10 else 3
    error = "" if value["se"] is None or value["se"] < 5e-4 else f" ± {value['se']:.3f}"
    return f"{value['mean']:.{digits}f}{error}"
