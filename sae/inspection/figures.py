"""What a run found, as matplotlib figures: every method in its own colour, the same one everywhere."""

from __future__ import annotations

import hashlib
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from sae.inspection.method_titles import method_title

METHOD_COLOURS = {"sae": "#0072b2", "pca": "#d55e00", "nmf": "#009e73"}
"""Colour-blind safe, after Okabe and Ito; other methods take the remaining ones in order of name."""
_OTHER_COLOURS = ("#cc79a7", "#b58900", "#56b4e9", "#7f7f7f", "#7b3294", "#8c510a", "#000000", "#80cdc1")
_GREY = "#5f6368"
STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titlepad": 10.0,
    "axes.facecolor": "none",
    "axes.edgecolor": "#9aa0a6",
    "axes.labelcolor": _GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "grid.color": "#e8eaed",
    "xtick.color": "#9aa0a6",
    "ytick.color": "#9aa0a6",
    "xtick.labelcolor": _GREY,
    "ytick.labelcolor": _GREY,
    "lines.linewidth": 1.8,
    "lines.markersize": 5.0,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text: it can be searched, and takes the page's fonts
    "svg.hashsalt": "sae",  # ids by content, not by chance
}
"""Of all figures; to be set by `matplotlib.rc_context(STYLE)` around the drawing."""


@matplotlib.rc_context(STYLE)
def fvu_by_components(metrics: dict[str, Any]) -> Figure:
    """FVU against coefficients per row, for every method.

    Lines: the first r components of a baseline, all of them used on every row. Points: each method at
    the autoencoder's L0, where a row chooses its own coefficients among all of the method's directions.

    Args:
        metrics: what metrics.json holds.
    """
    figure, (axes,) = panels(1, width=8.4)
    colours = method_colours(metrics)
    shown: set[float] = {float(metrics["l0"])}
    for name, row in metrics["baselines"].items():
        curve = {int(r): fvu for r, fvu in row.get("fvu_by_components", {}).items() if fvu is not None}
        if curve:
            r = sorted(curve)
            label = f"{method_title(name)}, all of r components"
            axes.plot(r, [curve[i] for i in r], "-o", color=colours[name], label=label)
            shown |= {float(i) for i in r}
    for name, row in _methods(metrics).items():
        if row["fvu"] is None:
            continue
        chosen = f"{method_title(name)}, {row['l0']:.3g} of {row['n_latents']:,} directions"
        axes.axhline(row["fvu"], color=colours[name], linewidth=0.8, linestyle=(0, (1, 3)))
        axes.plot([row["l0"]], [row["fvu"]], "D", color=colours[name], label=chosen, markeredgecolor="white")
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(FixedLocator(apart(sorted(shown))))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:.3g}")
    axes.set_ylim(bottom=0.0)
    axes.set(xlabel="coefficients per row", ylabel="FVU (held-out)", title="Variance left unexplained")
    figure.legend(loc="outside right upper", fontsize=8.5)
    return figure


@matplotlib.rc_context(STYLE)
def methods_at_equal_l0(metrics: dict[str, Any]) -> Figure:
    """Bars: FVU of every method at the autoencoder's L0, and the increase in cross entropy if measured.

    Args:
        metrics: what metrics.json holds; `ce_increase` (nats) may be missing or None.
    """
    methods = _methods(metrics)
    quantities = {"fvu": "FVU", "ce_increase": "Increase in cross entropy (nats)"}
    measured = {
        key: title
        for key, title in quantities.items()
        if key == "fvu" or any(row.get(key) is not None for row in methods.values())
    }
    figure, drawn = panels(len(measured))
    for axes, (key, title) in zip(drawn, measured.items(), strict=True):
        _bars(axes, {name: row.get(key) for name, row in methods.items()}, method_colours(metrics))
        axes.set(title=f"{title}, L0 = {metrics['l0']:.3g}")
    return figure


@matplotlib.rc_context(STYLE)
def density_histogram(densities: Float[Tensor, " n_latents"], rows: str = "held-out") -> Figure:
    """How often latents fire: log10 of the share of rows, over those that fired at all.

    Args:
        densities: share of rows on which each latent fired.
        rows: which rows, for the label.
    """
    alive = densities[densities > 0].double().cpu().log10().numpy()
    figure, (axes,) = panels(1)
    if len(alive):
        lowest = np.floor(4 * alive.min()) / 4 if alive.min() < 0 else -0.25
        axes.hist(alive, bins=np.arange(lowest, 0.125, 0.125).tolist(), color=METHOD_COLOURS["sae"])
    dead = len(densities) - len(alive)
    axes.set(
        title=f"Firing density of {len(densities):,} latents, {dead:,} dead",
        xlabel=f"log10 of the share of {rows} rows on which a latent fires",
        ylabel="latents",
    )
    return figure


@matplotlib.rc_context(STYLE)
def neighbour_histogram(cosines: Float[Tensor, " n_latents"]) -> Figure:
    """How close the closest other direction is to each direction.

    Args:
        cosines: |cos| of each direction with its nearest neighbour.
    """
    figure, (axes,) = panels(1)
    axes.hist(
        cosines.double().cpu().numpy(), bins=np.linspace(0, 1, 51).tolist(), color=METHOD_COLOURS["sae"]
    )
    axes.set_xlim(0, 1)
    median = float(cosines.double().median()) if len(cosines) else float("nan")
    axes.set(
        title=f"Nearest neighbours of {len(cosines):,} directions, median |cos| {median:.2f}",
        xlabel="|cos| with the nearest other direction",
        ylabel="directions",
    )
    return figure


@matplotlib.rc_context(STYLE)
def training_curves(folder: Path, dictionary: str | None = None) -> Figure | None:
    """FVU and dead latents over the training steps, from the run's TensorBoard events.

    Args:
        folder: the run folder, or the folder of the events themselves.
        dictionary: which one, in a run of several.

    Returns:
        None if there are no such events.
    """
    inside = folder / "tensorboard"
    curves = _scalars(inside if inside.is_dir() else folder)
    train, val = (f"{stage}/{dictionary}" if dictionary else stage for stage in ("train", "val"))
    quantities = {
        "FVU": {f"{train}/fvu": "train", f"{val}/fvu": "held-out"},
        "Dead latents": {
            f"{train}/dead_fraction": "train: not lately",
            f"{val}/dead_fraction": "held-out: never",
        },
    }
    if not any(tag in curves for tags in quantities.values() for tag in tags):
        return None
    figure, drawn = panels(len(quantities))
    for axes, (title, tags) in zip(drawn, quantities.items(), strict=True):
        for tag, label in tags.items():
            curve = curves.get(tag, {})
            style: dict[str, Any] = {"color": "#9cc3e0", "linewidth": 1.0}
            if tag.startswith("val/"):  # the same rows are scored once more at the end
                curve = curves.get(tag.replace("val/", "test/"), {}) | curve
                style = {"color": METHOD_COLOURS["sae"], "marker": "o"}
            steps = sorted(curve)
            axes.plot(steps, [curve[step] for step in steps], label=label, **style)
        axes.set(title=title, xlabel="step")
        axes.set_ylim(bottom=0.0)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 5, 10], integer=True))
        axes.legend(fontsize=8.5)
    return figure


def method_colours(metrics: dict[str, Any]) -> dict[str, str]:
    """A colour for the autoencoder ("sae") and each baseline of a run."""
    others = sorted(set(metrics["baselines"]) - set(METHOD_COLOURS))
    return METHOD_COLOURS | {name: _OTHER_COLOURS[i % len(_OTHER_COLOURS)] for i, name in enumerate(others)}


def to_svg(figure: Figure) -> str:
    """The figure as an `<svg>` element to put into an HTML page, the same bytes every time.

    Text stays text; every id starts with a hash of the drawing, so that figures share none in one page.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure.savefig(buffer, format="svg", metadata={"Date": None}, facecolor="none")
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Matplotlib's style sheet would hold for the whole page.
    svg = re.sub(r"\s*<defs>\s*<style.*?</style>\s*</defs>", "", svg, flags=re.DOTALL)
    own = "f" + hashlib.sha256(svg.encode()).hexdigest()[:10]
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{own}-", svg)
    return svg.replace("<svg ", '<svg role="img" style="stroke-linejoin: round; stroke-linecap: butt" ', 1)


def to_page(figure: Figure) -> bytes:
    """The figure as a file of its own, on white."""
    return (
        to_svg(figure)
        .replace('style="stroke-linejoin', 'style="background: white; stroke-linejoin', 1)
        .encode()
    )


def panels(n: int, width: float | None = None) -> tuple[Figure, list[Axes]]:
    """A figure of n panels side by side, in the style that the caller has set."""
    figure = Figure(figsize=(width or (6.4 if n == 1 else 8.4), 3.5), dpi=110, layout="constrained")
    return figure, list(figure.subplots(1, n, squeeze=False)[0])


def _methods(metrics: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The autoencoder's figures and those of each baseline."""
    return {"sae": metrics, **metrics["baselines"]}


def _bars(axes: Axes, values: dict[str, float | None], colours: dict[str, str]) -> None:
    """A bar for each method, with its value; methods without a value are left out. Many of them lie."""
    known = {name: value for name, value in values.items() if value is not None}
    titles, colour = [method_title(name) for name in known], [colours[n] for n in known]
    lying = len(known) > 4
    draw = axes.barh if lying else axes.bar
    bars = draw(titles, list(known.values()), 0.6, color=colour)
    axes.bar_label(bars, labels=[f"{value:#.3g}" for value in known.values()], padding=2, color="#3c4043")
    if lying:
        axes.invert_yaxis()
        axes.grid(axis="x")
        axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y" if lying else "x", length=0)
    axes.margins(x=0.15, y=0.12 if not lying else 0.02)


def apart(ticks: Sequence[float]) -> list[float]:
    """The ticks whose labels do not run into one another on a logarithmic axis."""
    kept: list[float] = []
    for tick in ticks:
        if tick > 0 and (not kept or tick > 1.15 * kept[-1]):
            kept.append(tick)
    return kept


def _scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Every scalar in a folder of events, by step; what a resumed run logs again replaces the earlier."""
    if not folder.is_dir():
        return {}
    events = EventAccumulator(
        str(folder), size_guidance={"scalars": 0, "images": 1, "histograms": 1}
    ).Reload()
    return {tag: {e.step: e.value for e in events.Scalars(tag)} for tag in events.Tags()["scalars"]}
