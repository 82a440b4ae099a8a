"""What is made of a run once it is trained: the report's facts and figures, and the projector's names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from sae.inspection import Reading
from sae.inspection.figures import (
    density_histogram,
    fvu_by_components,
    methods_at_equal_l0,
    neighbour_histogram,
    to_svg,
    training_curves,
)
from sae.inspection.projector import write_projector
from sae.inspection.report import ReportFacts, write_report
from sae.ops.geometry import nearest_neighbour_cosines
from sae.runs import Run, read_config, read_metrics

ABLATED = 24
"""Latents of which the measured effect is shown: so many of the clearest, and so many by chance."""

COMPARED = ("n_latents", "l0", "fvu", "ce_increase", "ce_spliced", "kl", "cosine", "dead_fraction")
"""Keys of metrics.json that the report's comparison shows."""


def report_run(run: Run, reading: Reading, folder: Path | None = None) -> Path:
    """Writes a run's report, and the directions for TensorBoard's projector; returns index.html.

    Args:
        run: finished or not.
        reading: of the same run; ablations are measured for a sample of its latents.
        folder: of the report; None = `report` in the run's folder.

    Raises:
        InputError: if `folder` holds something else than a report of ours.
    """
    reading.measure_ablations(_sample(reading))
    latents = reading.latents()
    page = write_report(
        folder or run.folder / "report", _facts(run, reading), latents, reading.n_latents, reading.text
    )
    if (run.folder / "tensorboard").is_dir():
        _write_projector(run, reading)
    return page


def _sample(reading: Reading) -> list[int]:
    """The clearest latents, and as many at random among the living."""
    alive = reading.evidence.firings.nonzero().squeeze(1)
    mixed = alive[torch.randperm(len(alive), generator=torch.Generator().manual_seed(0))]
    return sorted({*(r.latent for r in reading.clearest(ABLATED)), *mixed[:ABLATED].tolist()})


def _facts(run: Run, reading: Reading) -> ReportFacts:
    metrics, config = read_metrics(run.folder), read_config(run.folder)
    manifest = run.cache.manifest
    rows = run.cache.n_rows("train")
    facts = [
        ("model", f"{run.model} (d_model {run.dictionary.d_model:,})"),
        ("hookpoint", run.hookpoint),
        ("text", str(manifest.get("dataset"))),
        (
            "rows cached",
            f"{rows:,} to train on, {run.cache.n_rows('held_out'):,} held out, as {manifest['dtype']}",
        ),
        ("context", f"{manifest['context_length']:,} tokens"),
        ("dictionary", repr(run.dictionary)),
        ("rule", run.dictionary.inference),
        ("trained on", f"{metrics.get('tokens_seen', 0):,} tokens in {metrics.get('steps', 0):,} steps"),
        ("seed", str(config.get("seed_everything"))),
        ("evidence from", f"{reading.evidence.rows:,} train rows"),
    ]
    methods = {"SAE": metrics, **{name.upper(): row for name, row in metrics.get("baselines", {}).items()}}
    return ReportFacts(
        title=f"{run.dictionary.n_latents:,} directions at {run.hookpoint} of {Path(run.model or '-').name}",
        notes=[run.unfinished] if run.unfinished else [],
        facts=facts,
        comparison=[
            {"method": name, **{key: row.get(key) for key in COMPARED}}
            for name, row in methods.items()
            if row
        ],
        model_loss={key: metrics.get(key) for key in ("ce_clean", "ce_mean_ablated")},
        figures=_figures(run, reading, metrics),
    )


def _figures(run: Run, reading: Reading, metrics: dict[str, Any]) -> list[tuple[str, str]]:
    figures = []
    if metrics.get("baselines"):
        figures += [
            ("All methods with the same number of coefficients per row.", methods_at_equal_l0(metrics)),
            ("How much more components help PCA and NMF, all of them used.", fvu_by_components(metrics)),
        ]
    curves = training_curves(run.folder)
    if curves is not None:
        figures.append(("Training.", curves))
    densities = reading.evidence.firings.double() / reading.evidence.rows
    cosines = nearest_neighbour_cosines(run.dictionary.directions)
    figures += [
        ("How often latents fire, on the rows read for this report.", density_histogram(densities, "train")),
        ("Largest |cosine| of each direction with another one.", neighbour_histogram(cosines)),
    ]
    return [(caption, to_svg(figure)) for caption, figure in figures]


def _write_projector(run: Run, reading: Reading) -> None:
    names = []
    for latent in range(reading.n_latents):
        summary, top = reading.summary(latent), reading.evidence.inputs.top(latent, 1)
        token = reading.text(top[0].token) if top else "-"
        names.append(
            [
                str(latent),
                token,
                f"{summary.density:.3g}",
                f"{summary.clarity:.2f}",
                "alive" if top else "dead",
            ]
        )
    header = ["latent", "top token", "density", "clarity", "state"]
    steps = int(read_metrics(run.folder).get("steps", 0))
    write_projector(run.folder, run.dictionary.directions, names, header, steps)
