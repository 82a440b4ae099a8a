"""What is made of a run once it is trained: the report's facts and figures, and the projector's names."""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from sae.activations.language_model import weights_hash
from sae.errors import InputError
from sae.inspection import Reading
from sae.inspection.comparison_figures import natural_kurtosis
from sae.inspection.figures import (
    density_histogram,
    fvu_by_components,
    methods_at_equal_l0,
    neighbour_histogram,
    to_svg,
    training_curves,
)
from sae.inspection.geometry_page import geometry_page
from sae.inspection.method_titles import method_title
from sae.inspection.projector import write_projector
from sae.inspection.report import ReportFacts, check_report_folder, report_source, write_report
from sae.ops.geometry import nearest_neighbour_cosines
from sae.runs import Run, read_config, read_metrics, report_folder

ABLATED = 16
"""Latents of which the measured effect is shown: so many of the clearest, and so many by chance."""

COMPARED = (
    "n_latents", "l0", "bits_per_token", "fvu", "ce_increase", "ce_increase_se", "kl", "dead_fraction",
    "purity", "purity_null", "cancellation", "stability", "fit_s", "truth_f1", "truth_mcc",
)  # fmt: skip
"""Keys of metrics.json that the report's comparison shows."""


def report_run(
    run: Run, reading: Reading | None = None, *, model: str | None = None, folder: Path | None = None
) -> Path:
    """Writes a run's report, and the directions for TensorBoard's projector; returns index.html.

    Where the latents cannot be read (rows were imported, or the language model is not at hand), the
    report has everything else, and says so.

    Args:
        run: finished or not.
        reading: of the same run, where there is one already.
        model: where its language model is, as for `Run.reading`.
        folder: of the report; None = `report` in the run's folder, or `report/<name>` where the run has
            several dictionaries.

    Raises:
        InputError: if `folder` holds something else than a report of ours.
    """
    folder = folder or report_folder(run)
    check_report_folder(folder)
    unread = ""
    if reading is None:
        try:
            reading = run.reading(model)
        except InputError as error:
            if model is not None:
                raise
            unread = f"Latents were not read: {error}"
    facts = _facts(run, reading, unread)
    if reading is None:
        return write_report(folder, facts, (), 0, str)
    reading.measure_ablations(_sample(reading))
    page = write_report(folder, facts, reading.latents(), reading.n_latents, reading.text)
    if (run.folder / "tensorboard").is_dir() and run.name is None:  # the projector shows one
        try:
            _write_projector(run, reading)
        except OSError as error:
            print(f"the projector was not written: {error}", file=sys.stderr)
    return page


def is_reported(run: Run) -> bool:
    """Whether the run's report is of what the run is now."""
    return report_source(report_folder(run)) == _source(run)


def _source(run: Run) -> str:
    """What a report is made from: weights and metrics, and whether the latents could be read."""
    metrics = json.dumps(read_metrics(run.folder, run.name), sort_keys=True)
    return f"{weights_hash(run.dictionary)} {hashlib.sha256(metrics.encode()).hexdigest()[:16]}"


def _sample(reading: Reading) -> list[int]:
    """The clearest latents, and as many at random among the living."""
    alive = reading.evidence.firings.nonzero().squeeze(1)
    mixed = alive[torch.randperm(len(alive), generator=torch.Generator().manual_seed(0))]
    return sorted({*(r.latent for r in reading.clearest(ABLATED)), *mixed[:ABLATED].tolist()})


def _facts(run: Run, reading: Reading | None, unread: str) -> ReportFacts:
    metrics, config = read_metrics(run.folder, run.name), read_config(run.folder)
    manifest = run.cache.manifest
    held_out = f"{run.cache.n_rows('held_out'):,} held out, as {manifest['dtype']}"
    facts = [
        ("model", f"{run.model or 'imported rows'} (d_model {run.dictionary.d_model:,})"),
        ("hookpoint", run.hookpoint),
        ("text", str(manifest.get("dataset") or "-")),
        ("rows cached", f"{run.cache.n_rows('train'):,} to train on, {held_out}"),
        ("context", f"{manifest['context_length']:,} tokens" if manifest.get("context_length") else "-"),
        ("dictionary", repr(run.dictionary)),
        ("rule", run.dictionary.inference),
        ("trained on", f"{metrics.get('tokens_seen', 0):,} tokens in {metrics.get('steps', 0):,} steps"),
        ("seed", str(config.get("seed_everything"))),
    ]
    if reading is not None:
        facts.append(("evidence from", f"{reading.evidence.rows:,} train rows"))
    rows = {
        run.name or "SAE": metrics,
        **{method_title(name): row for name, row in metrics.get("baselines", {}).items()},
    }
    compared = [{"method": name, **{k: row.get(k) for k in COMPARED}} for name, row in rows.items() if row]
    of = Path(run.model).name if run.model else run.folder.name
    title = f"{run.name}: " if run.name else ""
    return ReportFacts(
        title=f"{title}{run.dictionary.n_latents:,} directions at {run.hookpoint} of {of}",
        notes=[note for note in (run.unfinished, unread) if note],
        facts=facts,
        comparison=compared,
        model_loss={key: metrics.get(key) for key in ("ce_clean", "ce_mean_ablated")},
        figures=_figures(run, reading, metrics),
        source="" if unread else _source(run),
        tokens_scored=metrics.get("ce_tokens"),
        geometry=geometry_page(metrics["geometry"]) if metrics.get("geometry") else (),
    )


def _figures(run: Run, reading: Reading | None, metrics: dict[str, Any]) -> list[tuple[str, str]]:
    figures = []
    if metrics.get("baselines"):
        figures += [
            ("All methods with the same number of coefficients per row.", methods_at_equal_l0(metrics)),
            ("How much more components help PCA and NMF, all of them used.", fvu_by_components(metrics)),
        ]
    kurtosis = natural_kurtosis(metrics)
    if kurtosis is not None:
        caption = "Tails of the coordinates: above those of random rotations, training has singled some out."
        figures.append((caption, kurtosis))
    curves = training_curves(run.folder, run.name)
    if curves is not None:
        figures.append(("Training.", curves))
    if reading is not None:
        densities = reading.evidence.firings.double() / reading.evidence.rows
        caption = "How often latents fire, on the rows read for this report."
        figures.append((caption, density_histogram(densities, "train")))
    cosines = nearest_neighbour_cosines(run.dictionary.directions)
    figures.append(("Largest |cosine| of each direction with another one.", neighbour_histogram(cosines)))
    return [(caption, to_svg(figure)) for caption, figure in figures]


def _write_projector(run: Run, reading: Reading) -> None:
    names = []
    for latent in range(reading.n_latents):
        summary, top = reading.summary(latent), reading.evidence.inputs.top(latent, 1)
        token, state = (reading.text(top[0].token), "alive") if top else ("-", "dead")
        names.append([str(latent), token, f"{summary.density:.3g}", f"{summary.clarity:.2f}", state])
    header = ["latent", "top token", "density", "clarity", "state"]
    steps = int(read_metrics(run.folder).get("steps", 0))
    write_projector(run.folder, run.dictionary.directions, names, header, steps)
