"""The report's page on how the directions lie: two tables, two figures."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sae.inspection.comparison_figures import SETS, almost_orthogonal_sets, neighbours_of_sets
from sae.inspection.figures import to_svg
from sae.inspection.report import Grid

_SIZES = {"found": "sae", "random": "random", "W_E": "W_E", "W_U": "W_U", "pca": "pca"}
_MANY = 1e7  # a bound above it is written by its power of ten


def geometry_page(geometry: Mapping[str, Any]) -> tuple[Grid, ...]:
    """What `geometry` of metrics.json holds, as the report shows it."""
    neighbours = Grid(
        "How close directions lie",
        "Nearest neighbours: median, middle half, 5 to 95 %. Grey: as many random directions, by formula.",
        ["directions", "n", "nearest |cos|, median", "coherence", "Welch bound", "frame potential",
         "effective rank", "antipodal pairs", "|cos|, firing together", "effective size"],
        [_set_row(which, of) for which, of in geometry["sets"].items()],
        to_svg(neighbours_of_sets(geometry)),
    )  # fmt: skip
    rows = geometry["almost_orthogonal"]
    shown = {key: SETS[which][0] for key, which in _SIZES.items() if key in rows[0]}
    sets = Grid(
        "Almost-orthogonal sets",
        "Sets with all |cos| below ε, by greedy choice: lower bounds. Dotted lines: what is proved.",
        ["ε", *shown.values(), "at least there are", "at most"],
        [
            [f"{row['epsilon']:g}", *(f"{row[key]:,}" for key in shown)]
            + [_bound(row["greedy_bound"]), _bound(row["upper_bound"])]
            for row in rows
        ],
        to_svg(almost_orthogonal_sets(geometry)),
    )
    return neighbours, sets


def _set_row(which: str, of: Mapping[str, Any]) -> list[str]:
    together = (of["cofirings"] or {}).get("mean_square")
    return [
        SETS[which][0],
        f"{of['n']:,}",
        f"{of['nearest'][2]:.3f}",
        f"{of['coherence']:.3f}",
        f"{of['welch']:.3f}",
        f"{of['frame_potential']:.2f}",
        f"{of['effective_rank']:.1f}",
        f"{of['antipodal_pairs']:,}",
        "–" if together is None else f"{together**0.5:.3f}",
        "–" if of["effective_size"] is None else f"{of['effective_size']:,.0f}",
    ]


def _bound(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:,.0f}" if value < _MANY else f"{value:.1e}"
