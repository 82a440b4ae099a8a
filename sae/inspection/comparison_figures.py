"""Figures that compare methods over L0 and bits, and sets of directions by how they lie."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from sae.inspection.figures import STYLE, apart, panels

_COLOURS = (
    "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#b58900", "#56b4e9", "#7f7f7f", "#7b3294", "#8c510a",
    "#000000",
)  # fmt: skip
_DASHES, _MARKERS = ("-", "--", ":"), ("o", "s", "^")


@matplotlib.rc_context(STYLE)
def frontier(
    points: Mapping[str, Sequence[tuple[float, float]]], x: str = "L0", title: str = "What each method leaves"
) -> Figure:
    """FVU against L0 (or bits) for every method: lower and further left is better.

    Args:
        points: (x, FVU) by method.
        x: what the first number is.
        title: above the figure.
    """
    figure, (axes,) = panels(1, width=8.4)
    figure.set_figheight(max(figure.get_figheight(), 0.21 * len(points)))  # the legend is beside it
    for i, (method, found) in enumerate(sorted(points.items(), key=lambda item: item[1][-1][1])):
        turn = i // len(_COLOURS) % len(_DASHES)
        style = {
            "color": _COLOURS[i % len(_COLOURS)],
            "linestyle": _DASHES[turn],
            "marker": _MARKERS[turn],
        }
        axes.plot([at for at, _ in found], [fvu for _, fvu in found], label=method, **style)
    axes.set_xscale("log", base=2)
    ticks = sorted({at for found in points.values() for at, _ in found})
    axes.xaxis.set_major_locator(FixedLocator(apart(ticks)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda at, _: f"{at:.3g}")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda at, _: f"{at:.3g}")
    axes.yaxis.set_minor_formatter(lambda at, _: f"{at:.1g}" if f"{at:e}"[0] in "25" else "")
    axes.set(xlabel=x, ylabel="FVU (held-out)", title=title)
    figure.legend(loc="outside right upper", fontsize=8.5)
    return figure


SETS = {
    "sae": ("the dictionary", "#0072b2"),
    "random": ("random directions", "#7f7f7f"),
    "W_E": ("W_E, token embeddings", "#d55e00"),
    "W_U": ("W_U, unembedding", "#cc79a7"),
    "pca": ("PCA: n = d_model", "#009e73"),
}
"""Sets of directions in `geometry` of metrics.json: what they are, and their colours."""


@matplotlib.rc_context(STYLE)
def neighbours_of_sets(geometry: Mapping[str, Any]) -> Figure:
    """Nearest neighbours of every set of directions: median, middle half, and 5 to 95 %.

    Args:
        geometry: as in metrics.json.
    """
    figure, (axes,) = panels(1, width=8.4)
    sets = [(which, of) for which, of in geometry["sets"].items() if which != "pca"]
    for at, (which, of) in enumerate(sets):
        colour, (low, first, middle, third, high) = SETS[which][1], of["nearest"]
        axes.plot([low, high], [at, at], color=colour, linewidth=1.2)
        axes.plot([first, third], [at, at], color=colour, linewidth=7, solid_capstyle="butt")
        axes.plot([middle], [at], "o", color="white", markersize=4)
    low, _, middle, _, high = geometry["null"]
    axes.axvspan(low, high, color="#e8eaed", zorder=0, label="random, by formula: 5 to 95 %")
    axes.axvline(middle, color="#9aa0a6", linewidth=1.0, linestyle="--", label="its median")
    axes.set_yticks(range(len(sets)), [f"{SETS[which][0]} ({of['n']:,})" for which, of in sets])
    axes.invert_yaxis()
    axes.set_xlim(0.0, 1.0)
    axes.grid(visible=False, axis="y")
    axes.set(xlabel="|cos| with the nearest other direction", title="Nearest neighbours")
    axes.legend(fontsize=8.5)
    return figure


@matplotlib.rc_context(STYLE)
def almost_orthogonal_sets(geometry: Mapping[str, Any]) -> Figure:
    """How many directions with all |cos| < epsilon were found in each set, against epsilon.

    Args:
        geometry: as in metrics.json.
    """
    figure, (axes,) = panels(1, width=8.4)
    rows = geometry["almost_orthogonal"]
    epsilons = [row["epsilon"] for row in rows]
    keys = {"found": "sae", **{which: which for which in SETS if which != "sae"}}
    for key, which in keys.items():
        if key in rows[0]:
            label, colour = SETS[which]
            marker = "" if which == "pca" else "o"
            axes.plot(epsilons, [row[key] for row in rows], marker=marker, color=colour, label=label)
    most = 2 * max(row["found"] for row in rows)
    for key, label, line in (("greedy_bound", "there are at least", ":"), ("upper_bound", "at most", "-.")):
        known = [(row["epsilon"], row[key]) for row in rows if row[key] is not None and 1 <= row[key] <= most]
        if known:
            bounds = {"color": "#9aa0a6", "linestyle": line, "label": f"in d_model dimensions {label}"}
            axes.plot([epsilon for epsilon, _ in known], [bound for _, bound in known], **bounds)
    axes.set_yscale("log")
    axes.set(xlabel="epsilon", ylabel="directions", title="Largest sets found with all |cos| < epsilon")
    figure.legend(loc="outside right upper", fontsize=8.5)
    return figure


@matplotlib.rc_context(STYLE)
def natural_kurtosis(metrics: Mapping[str, Any]) -> Figure | None:
    """Excess kurtosis of the coordinates by rank, beside those of random rotations.

    Args:
        metrics: what metrics.json holds of one dictionary; without the natural basis there is no figure.
    """
    row = metrics.get("baselines", {}).get("natural", {})
    if "kurtosis" not in row:
        return None
    figure, (axes,) = panels(1, width=8.4)
    last = len(row["kurtosis"]) - 1  # at equal shares of the coordinates
    shares = [100 * i / last for i in range(last + 1)]
    for key, colour, label in (
        ("kurtosis_rotated", "#7f7f7f", "under random rotations"),
        ("kurtosis", "#d55e00", "coordinates as they are"),
    ):
        axes.plot(shares, row[key], "-o", color=colour, label=label, markersize=3.5)
    axes.axhline(0.0, color="#9aa0a6", linewidth=1.0, linestyle="--", label="a Gaussian")
    axes.set_yscale("symlog", linthresh=1.0)
    axes.yaxis.set_major_formatter(lambda at, _: f"{at:g}")
    axes.set(
        xlabel="% of the coordinates, by rank", ylabel="excess kurtosis", title="Is a basis singled out?"
    )
    figure.legend(loc="outside right upper", fontsize=8.5)
    return figure


@matplotlib.rc_context(STYLE)
def width_tradeoff(
    fvu: Sequence[tuple[int, float]],
    law: Sequence[tuple[int, float]],
    law_title: str,
    sizes: Mapping[float, Sequence[tuple[int, int, int]]],
    d_model: int,
) -> Figure:
    """FVU against width with its law, and almost-orthogonal sets against width at several epsilons.

    Args:
        fvu: (n_latents, FVU) by rising width.
        law: what a law says in place of the FVU.
        law_title: how it is written.
        sizes: by epsilon, (n_latents, set found, set among random directions).
        d_model: width of the rows, for the basis.
    """
    figure, (left, right) = panels(2, width=9.6)
    n = [width for width, _ in fvu]
    left.plot(n, [value for _, value in fvu], "o", color=SETS["sae"][1], label="dictionaries")
    left.plot(*zip(*law, strict=True), "--", color="#9aa0a6", label=law_title)
    left.set(xlabel="latents", ylabel="FVU (held-out)", title="What width buys")
    for i, (epsilon, rows) in enumerate(sorted(sizes.items())):
        colour = _COLOURS[i % len(_COLOURS)]
        right.plot(n, [row[1] for row in rows], "-o", color=colour, label=f"ε = {epsilon:g}")
        right.plot(n, [row[2] for row in rows], ":", color=colour)
    right.axhline(d_model, color="#9aa0a6", linewidth=1.0, label="a basis")
    right.set(xlabel="latents", ylabel="directions", title="Sets with |cos| < ε (dotted: random)")
    for axes in (left, right):
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.xaxis.set_major_formatter(lambda at, _: f"{at:,.0f}")
    left.legend(fontsize=8.5)
    figure.legend(handles=right.get_legend_handles_labels()[0], loc="outside right upper", fontsize=8.5)
    return figure


@matplotlib.rc_context(STYLE)
def epsilon_tradeoff(
    fvu: Mapping[int, Sequence[tuple[float, float]]], law: Sequence[tuple[float, float]], law_title: str
) -> Figure:
    """FVU of the almost-orthogonal sets of each width against epsilon, and the law of all of them.

    Args:
        fvu: (epsilon, FVU of the largest set found) by n_latents.
        law: what a law says, without the width; empty for none.
        law_title: how it is written.
    """
    figure, (axes,) = panels(1, width=8.4)
    shades = matplotlib.colormaps["viridis"].resampled(len(fvu) + 1)  # its end is too bright for lines
    for i, (n, found) in enumerate(sorted(fvu.items())):
        axes.plot(*zip(*found, strict=True), "-o", color=shades(i), label=f"of {n:,} latents", markersize=4)
    if law:
        axes.plot(*zip(*law, strict=True), "--", color="#202124", linewidth=1.2, label=law_title)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda at, _: f"{at:.3g}")
    title = "What sets with all |cos| < ε leave"
    axes.set(xlabel="ε", ylabel="FVU, coded with the set alone", title=title)
    figure.legend(loc="outside right upper", fontsize=8.5)
    return figure
