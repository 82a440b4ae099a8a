"""Every method on one cache, at every L0, over several seeds: the table that the claim stands or falls by."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae.baselines import Baseline
from sae.callbacks.baselines import fitted_baselines, nearest_l0
from sae.checkpoints import LAST, read_checkpoint
from sae.dictionaries import Dictionary, Refined, load_dictionary
from sae.errors import InputError
from sae.inspection.method_titles import method_title
from sae.ops.bits import bits_per_row
from sae.ops.metrics import ReconstructionMetrics
from sae.ops.stability import share_found_again
from sae.training.names import SINGLE, metrics_of_each

COLUMNS = {
    "fvu": ("FVU", ".4f"),
    "ce_increase": ("CE +nats", ".4f"),
    "purity": ("purity", ".3f"),
    "purity_null": ("by chance", ".3f"),
    "bits_per_token": ("bits", ".0f"),
    "cancellation": ("cancelled", ".0%"),
    "stability": ("found again", ".0%"),
    "dead_fraction": ("dead", ".0%"),
    "fit_s": ("fit, s", ".0f"),
}
"""Keys of metrics.json, their titles and formats."""


class Row(NamedTuple):
    """A method at an L0, over the seeds."""

    method: str
    l0: int
    """Of the dictionaries that it stands beside, rounded."""
    n_latents: int
    trained: bool
    """By gradients, not fitted."""
    scores: dict[str, list[float]]
    """One value a seed, of those that are known."""


def compare(runs: Mapping[Path, dict[str, Any]]) -> list[Row]:
    """The rows of runs that differ by their seed alone, by L0 and FVU.

    A baseline that several dictionaries share at one L0 is one row. Stability is the share of directions that
    another run's dictionary or baseline has too (`sae.ops.stability`); a baseline with several starts of its
    own in each run brings that instead.

    Args:
        runs: what metrics.json holds, by run folder.

    Raises:
        InputError: if there is none, or they have other dictionaries.
    """
    folders = list(runs)
    if not folders:
        raise InputError("`runs` must be at least one run folder, got none.")
    several = [metrics_of_each(metrics) for metrics in runs.values()]
    for folder, found in zip(folders, several, strict=True):
        if found.keys() != several[0].keys():
            raise InputError(
                f"{folder} has the dictionaries {', '.join(found)}, {folders[0]} has {', '.join(several[0])};"
                " compare runs of one configuration."
            )
    rows: dict[tuple[str, int], Row] = {}
    for found in several:
        at_this_seed: dict[tuple[str, int], tuple[bool, Mapping[str, Any]]] = {}
        for name, own in found.items():
            l0 = round(own["l0"])
            at_this_seed["SAE" if name == SINGLE else name, l0] = True, own
            for baseline, of in own["baselines"].items():
                at_this_seed[method_title(baseline), of["k"]] = False, of
        for (method, l0), (trained, of) in at_this_seed.items():
            row = rows.setdefault((method, l0), Row(method, l0, of["n_latents"], trained, {}))
            for key in COLUMNS:
                if of.get(key) is not None:
                    row.scores.setdefault(key, []).append(float(of[key]))
    _add_stability(rows, folders, several)
    return in_order(rows.values())


def in_order(rows: Iterable[Row]) -> list[Row]:
    """By L0, then by FVU."""
    return sorted(rows, key=lambda row: (row.l0, mean(row.scores["fvu"])))


@torch.no_grad()
def searched(
    name: str,
    dictionaries: Iterable[Dictionary],
    k: int,
    batches: Callable[[], Iterable[Tensor]],
    mean: Tensor,
) -> Row:
    """The same directions without their encoder, coded by a non-negative orthogonal pursuit.

    What it gains on the autoencoder's own row is what its encoder misses (`sae.Refined`), so that directions
    can be held against directions. k-means and NMF of split rows are coded so; dictionary learning, ICA
    and random directions by a pursuit of both signs, which usually leaves less.

    Args:
        name: of the dictionary in the runs.
        dictionaries: one a seed.
        k: latents a row.
        batches: begins one pass over the held-out rows.
        mean: of the training rows.
    """
    scores: dict[str, list[float]] = {}
    n_latents = 0
    for dictionary in dictionaries:
        refined, n_latents = Refined.of(dictionary, "omp", k), dictionary.n_latents
        metrics = ReconstructionMetrics(n_latents, mean.to(refined.device))
        for rows in batches():
            x = rows.to(refined.device, torch.float32)
            code = refined.encode_sparse(x)
            metrics.add(x, refined.decode_sparse(code), code, None)
        found = metrics.compute()
        of_seed = {"fvu": found.fvu, "bits_per_token": bits_per_row(n_latents, found.l0, signed=False)}
        for key, value in (of_seed | {"dead_fraction": found.dead_fraction}).items():
            if value is not None:
                scores.setdefault(key, []).append(value)
    return Row(f"{name}, searched", k, n_latents, True, scores)


def table(rows: Iterable[Row]) -> str:
    """The rows in Markdown, mean ± standard error where there are several seeds."""
    rows = list(rows)
    known = [key for key in COLUMNS if any(key in row.scores for row in rows)]
    titles = ["L0", "method", "directions", *(COLUMNS[key][0] for key in known)]
    lines = [f"| {' | '.join(titles)} |", f"|{' --- |' * len(titles)}"]
    for row in rows:
        cells = [str(row.l0), f"**{row.method}**" if row.trained else row.method, f"{row.n_latents:,}"]
        cells += [_cell(row.scores.get(key), COLUMNS[key][1]) for key in known]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def frontier_points(rows: Iterable[Row], x: str = "l0") -> dict[str, list[tuple[float, float]]]:
    """(x, FVU) of every method by rising x; the autoencoders of several L0 are one, by their names' stem.

    Args:
        rows: from `compare`.
        x: `l0`, or a key of `COLUMNS`.
    """
    points: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        at = float(row.l0) if x == "l0" else mean(row.scores[x])
        name, comma, rest = row.method.partition(",")
        stem = name.rstrip("0123456789").rstrip("_") or name
        points.setdefault(stem + comma + rest, []).append((at, mean(row.scores["fvu"])))
    return {method: sorted(found) for method, found in points.items()}


def _add_stability(
    rows: dict[tuple[str, int], Row], folders: list[Path], several: list[dict[str, dict[str, Any]]]
) -> None:
    """Of each dictionary, baseline and seed, the mean over the other seeds."""
    if len(folders) < 2:
        return
    for name in several[0]:
        inside = "dictionary" if name == SINGLE else f"dictionaries/{name}"
        directions = [load_dictionary(folder / inside).directions for folder in folders]
        for shares, found in zip(_found_again(directions), several, strict=True):
            row = rows["SAE" if name == SINGLE else name, round(found[name]["l0"])]
            row.scores.setdefault("stability", []).append(shares)
    fits = [_baselines_of(folder) for folder in folders]
    for name in set.intersection(*(set(of) for of in fits)):
        title = method_title(name)
        for row in [row for (method, _), row in rows.items() if method == title and not row.trained]:
            if "stability" not in row.scores and len(row.scores["fvu"]) == len(folders):
                directions = [of[name][nearest_l0(of[name], row.l0)].directions for of in fits]
                row.scores["stability"] = _found_again(directions)


def _baselines_of(folder: Path) -> dict[str, dict[int | None, Baseline]]:
    """Those of a run; none, and a word of it, where its last checkpoint cannot be read."""
    try:
        return fitted_baselines(read_checkpoint(folder / "checkpoints" / LAST))
    except InputError as error:  # no reason to lose the rest
        print(f"What seeds find again of the baselines is not told: {error}", file=sys.stderr)
        return {}


def _found_again(directions: list[Tensor]) -> list[float]:
    """The share of each that the others have, in the mean over these."""
    return [
        mean(share_found_again(mine, other) for j, other in enumerate(directions) if j != i)
        for i, mine in enumerate(directions)
    ]


def _cell(values: list[float] | None, form: str) -> str:
    if not values:
        return "–"
    text = format(mean(values), form)
    if len(values) < 2:
        return text
    error = format(stdev(values) / math.sqrt(len(values)), form)
    return text if float(error.strip("%")) == 0.0 else f"{text} ± {error}"
