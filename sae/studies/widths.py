"""FVU against width against epsilon: what more directions buy, and how far apart they can stay."""

from __future__ import annotations

from typing import Any, NamedTuple

from sae.errors import InputError
from sae.studies.planted_capacity import PowerLaw, fit_power_law
from sae.training.names import metrics_of_each

FEWEST = 3
"""Widths that a law is fitted to, at least."""


class Width(NamedTuple):
    """A dictionary of a run, with the almost-orthogonal sets among its living latents."""

    name: str
    n_latents: int
    alive: int
    d_model: int
    fvu: float
    found: dict[float, int]
    """By epsilon: the largest set found, a lower bound."""
    random: dict[float, int]
    """The same among as many random directions."""


def widths_of(metrics: dict[str, Any]) -> list[Width]:
    """The dictionaries of a run, from its metrics.json, by width, which is all that they should differ in.

    Raises:
        InputError: if it has too few, or did not measure their geometry.
    """
    several = metrics_of_each(metrics)
    if len(several) < FEWEST or any(own.get("geometry") is None for own in several.values()):
        raise InputError(
            f"the run must have {FEWEST} or more dictionaries and their geometry, as in configs/widths.yaml:"
            " list them under `model.dictionaries`, and DirectionGeometry among the callbacks."
        )
    found = []
    for name, own in several.items():
        rows = own["geometry"]["almost_orthogonal"]
        sizes = [{row["epsilon"]: row[key] for row in rows} for key in ("found", "random")]
        alive = own["geometry"]["sets"]["sae"]["n"]
        found.append(Width(name, own["n_latents"], alive, metrics["d_model"], own["fvu"], *sizes))
    return sorted(found, key=lambda width: width.n_latents)


def law_of(widths: list[Width]) -> PowerLaw:
    """FVU = scale n^-exponent over the widths, with the exponent's 90 % interval."""
    return fit_power_law([width.n_latents for width in widths], [width.fvu for width in widths])


def table(widths: list[Width]) -> str:
    """The widths in Markdown: at each epsilon the set found, and that among as many random directions."""
    epsilons = list(widths[0].found)
    titles = ["n_latents", "n / d_model", "alive", "FVU", *(f"ε = {epsilon:g}" for epsilon in epsilons)]
    lines = [f"| {' | '.join(titles)} |", f"|{' --- |' * len(titles)}"]
    for width in widths:
        cells = [f"{width.n_latents:,}", f"{width.n_latents / width.d_model:g}", f"{width.alive:,}"]
        cells += [f"{width.fvu:.4f}"]
        cells += [f"{width.found[epsilon]:,} ({width.random[epsilon]:,})" for epsilon in epsilons]
        lines.append(f"| {' | '.join(cells)} |")
    law = law_of(widths)
    return "\n".join(lines) + (
        f"\n\nIn brackets: among as many random directions. A basis has d_model = {widths[0].d_model}.\n"
        f"FVU = {law.scale:.3g} n^-{law.exponent:.3f}, 90 % interval {law.low:.3f} to {law.high:.3f};"
        f" log FVU off the line by {law.residual:.3f}."
    )
