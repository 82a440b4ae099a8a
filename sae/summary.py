"""A run in a few lines: every method at the autoencoder's own L0."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sae.inspection.method_titles import method_title
from sae.runs import read_metrics
from sae.training.names import SINGLE, metrics_of_each


def summary(folder: Path) -> str:
    """The comparison table of a run: every method at the autoencoder's own L0."""
    metrics = read_metrics(folder)
    if not metrics:
        return "this run was not scored."
    several = metrics_of_each(metrics)
    lines = _table("held-out rows", several, _COLUMNS)
    own = next(iter(several.values()))
    if own.get("ce_clean") is not None:
        lines.append(
            f"cross entropy of the model: {own['ce_clean']:.4f} nats a token as it is,"
            f" {own['ce_mean_ablated']:.4f} with the mean in place of these activations"
        )
        error = ", ".join(_cell(row["ce_increase_se"], 0, ".4f") for row in several.values())
        whose = "the SAE's increase" if SINGLE in several else "the increases"
        lines.append(f"(on {own['ce_tokens']:,} held-out tokens; standard error of {whose} {error})")
    if "truth" in own:
        lines += _table("of the truth", {name: _of_the_truth(row) for name, row in several.items()}, _TRUTH)
    rate = _cell(metrics["tokens_per_s"], 0, ",.0f")
    lines.append(
        f"{metrics['tokens_seen']:,} tokens seen in {metrics['steps']:,} steps, {rate} tokens/s,"
        f" {metrics['wall_s']:.0f} s in all"
    )
    if any(round(row["l0"]) >= row["d_model"] and row["baselines"] for row in several.values()):
        lines.append("L0 is not below d_model: PCA is exact there, so the comparison says nothing.")
    return "\n".join(lines)


def _table(heading: str, several: dict[str, dict[str, Any]], columns: Sequence[_Column]) -> list[str]:
    """Of each dictionary a row, and one for each of its baselines."""
    lines = [f"{heading:<14}" + "".join(f"{title:>{width}}" for title, _, width, _ in columns)]
    for name, own in several.items():
        rows = {"SAE" if name == SINGLE else name: own}
        rows |= {method_title(baseline): row for baseline, row in own["baselines"].items()}
        for method, row in rows.items():
            cells = [_cell(row.get(key), width, form) for _, key, width, form in columns]
            lines.append(f"{_fitted(method, indented=row is not own and len(several) > 1)}" + "".join(cells))
    return lines


def _of_the_truth(own: dict[str, Any]) -> dict[str, Any]:
    """What stands in a row of the second table, and the references below the baselines."""
    below = own["baselines"] | {name.split()[0]: row for name, row in own["truth_references"].items()}
    flat = {name: row["truth"] | row for name, row in below.items()}
    return own["truth"] | own | {"baselines": flat}


def _fitted(method: str, indented: bool) -> str:
    """A method's name in the first column; baselines stand below the dictionary whose L0 they have."""
    text = f"  {method}" if indented else method
    return f"{text if len(text) <= 13 else text[:12] + '…':<14}"


_Column = tuple[str, str, int, str]
"""Title, key in metrics.json, width, format."""
_COLUMNS: tuple[_Column, ...] = (
    ("FVU", "fvu", 9, ".4f"),
    ("w/o pos. 0", "fvu_without_first_position", 12, ".4f"),
    ("median", "fvu_median", 9, ".4f"),
    ("L0", "l0", 8, ".2f"),
    ("dead", "dead_fraction", 8, ".1%"),
    ("CE +nats", "ce_increase", 10, ".4f"),
    ("KL", "kl", 8, ".4f"),
    ("purity", "purity", 8, ".3f"),
    ("null", "purity_null", 6, ".3f"),
    ("bits", "bits_per_token", 6, ".0f"),
    ("directions", "n_latents", 12, ","),
)
_TRUTH: tuple[_Column, ...] = (  # F1 and MCC between chance (0) and the truth (1)
    ("F1", "truth_f1", 9, ".4f"),
    ("MCC", "truth_mcc", 12, ".4f"),
    ("precision", "precision", 11, ".4f"),
    ("recall", "recall", 8, ".4f"),
    ("F1, rare", "f1_rare", 10, ".4f"),
    ("absorption", "absorption", 12, ".4f"),
    ("hedging", "hedging", 9, ".4f"),
    ("slope", "shrinkage", 8, ".4f"),
)


def _cell(value: int | float | None, width: int, form: str) -> str:
    """A number at the right of its column, a dash where it has no meaning."""
    return f"{'-' if value is None else format(value, form):>{width}}"
