"""TensorBoard beyond single curves: all methods in one chart, histograms, figures, a row among runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.tensorboard.summary import hparams
from torch.utils.tensorboard.writer import FileWriter, SummaryWriter

from sae.activations import ActivationDataModule
from sae.callbacks.baselines import BaselineCallback
from sae.callbacks.event_files import cut_event_files, event_file_sizes
from sae.callbacks.run_folder import RunFolder
from sae.ops.geometry import nearest_neighbour_cosines
from sae.training import SparseAutoencoderModule
from sae.training.names import SINGLE, curve, metrics_of_each

AT_EQUAL_L0 = {
    "fvu": "FVU",
    "fvu_without_first_position": "FVU without first position",
    "cosine": "cosine",
    "dead_fraction": "dead fraction",
    "l0": "L0",
}
"""What every validation scores of every method, with the titles of the charts."""
AT_THE_END = {
    "ce_increase": "CE increase (nats)",
    "kl": "KL (nats)",
    "bits_per_token": "bits per token",
    "purity": "token purity",
    "purity_null": "token purity by chance",
    "cancellation": "cancellation",
    "stability": "seed stability",
    "fit_s": "time to fit (s)",
    "truth_f1": "F1 against the truth",
    "truth_mcc": "MCC against the truth",
}
"""What the end of a run measures of every method where the language model is at hand, or the truth known."""
_IN_THE_TABLE = ("fvu", "l0", "dead_fraction", "cosine", "ce_increase")
_OF_A_WORLD = ("truth_f1", "truth_mcc")
_HPARAMS = ".hparams"  # ending of the event file that a later session of the run replaces


class TensorBoardPanels(lightning.Callback):
    """Adds to the run's TensorBoard what single curves do not show; without TensorBoard it does nothing.

    A custom scalars chart for each quantity with every method in it, histograms of the firing densities
    and of the nearest neighbours' cosines, the figures of `sae.inspection.figures`, and a row in the
    table of hyperparameters. It comes after `RunFolder` among the callbacks.
    """

    def on_train_start(self, trainer: lightning.Trainer, pl_module: SparseAutoencoderModule) -> None:
        """Lays out the charts, once in a run."""
        if trainer.global_step == 0 and (writer := _writer(trainer)):
            writer.add_custom_scalars(_layout(trainer, {name: AT_EQUAL_L0 for name in pl_module.learners}))

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Remembers how far the curves have come."""
        if writer := _writer(trainer):
            checkpoint["event_files"] = event_file_sizes(writer)

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Cuts the curves off there: no step is shown twice."""
        if (writer := _writer(trainer)) and "event_files" in checkpoint:
            cut_event_files(writer, checkpoint["event_files"], checkpoint["global_step"])

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: SparseAutoencoderModule) -> None:
        """Draws the firing densities."""
        writer = _writer(trainer)
        if writer is None or trainer.sanity_checking:
            return
        for name, densities in pl_module.held_out.densities.items():
            alive = densities[densities > 0].log10().cpu().numpy()
            if len(alive):
                tag = curve("latents", name, "log10_density")
                writer.add_histogram(tag, alive, trainer.global_step, bins=64)  # pyright: ignore

    def on_test_end(self, trainer: lightning.Trainer, pl_module: SparseAutoencoderModule) -> None:
        """Draws what is known at the end."""
        metrics = next((c.last_metrics for c in trainer.callbacks if isinstance(c, RunFolder)), {})
        writer, step = _writer(trainer), trainer.global_step
        if writer is None or not metrics:
            return
        each = metrics_of_each(metrics)
        titles = {name: _measured(writer, name, own, step) for name, own in each.items()}
        writer.add_custom_scalars(_layout(trainer, titles))  # the last one counts
        for name, own in each.items():
            with torch.inference_mode():
                cosines = nearest_neighbour_cosines(pl_module.dictionaries[name].directions).float().cpu()
            bins = np.linspace(0, 1, 51).tolist()
            tag = curve("latents", name, "nearest_neighbour_cosine")
            writer.add_histogram(tag, cosines.numpy(), step, bins=bins)
            writer.flush()
            _add_figures(writer, name, own, pl_module.held_out.densities.get(name), cosines, step)
        writer.flush()
        _replace_hparams(
            Path(writer.get_logdir()),
            _hyperparameters(trainer, pl_module, metrics),
            [tag for name, own in each.items() for tag in _in_the_table(name, own)],
        )


def _measured(writer: SummaryWriter, name: str, metrics: dict[str, Any], step: int) -> dict[str, str]:
    """Draws what was measured at the end; gives the titles of all that is known."""
    methods = {"test": metrics} | {f"baseline/{n}": row for n, row in metrics["baselines"].items()}
    measured = [key for key in AT_THE_END if any(row.get(key) is not None for row in methods.values())]
    for prefix, row in methods.items():
        for key in measured:
            if row.get(key) is not None:
                writer.add_scalar(curve(prefix, name, key), row[key], step)
    return AT_EQUAL_L0 | {key: AT_THE_END[key] for key in measured}


def _in_the_table(name: str, metrics: dict[str, Any]) -> list[str]:
    """Tags of a dictionary's columns in the table of hyperparameters."""
    keys = [*_IN_THE_TABLE, *(key for key in _OF_A_WORLD if key in metrics)]
    return [curve("test", name, key) for key in keys] + [
        curve(f"baseline/{baseline}", name, "fvu") for baseline in metrics["baselines"]
    ]


def _writer(trainer: lightning.Trainer) -> SummaryWriter | None:
    """What the run's TensorBoard logger writes with, on rank 0."""
    if not trainer.is_global_zero:
        return None
    return next((log.experiment for log in trainer.loggers if isinstance(log, TensorBoardLogger)), None)


def _layout(trainer: lightning.Trainer, titles: dict[str, dict[str, str]]) -> dict[str, Any]:
    """Charts by dictionary and quantity; tags are regular expressions that match from the beginning."""
    methods = ["(val|test)"]
    methods += [f"baseline/{c.name}" for c in trainer.callbacks if isinstance(c, BaselineCallback)]
    heading = "Every method on the held-out rows, at equal L0"
    return {
        heading if name == SINGLE else f"{name}: {heading[0].lower()}{heading[1:]}": {
            title: ["Multiline", [f"^{curve(method, name, key)}$" for method in methods]]
            for key, title in of.items()
        }
        for name, of in titles.items()
    }


def _add_figures(
    writer: SummaryWriter,
    name: str,
    metrics: dict[str, Any],
    densities: Tensor | None,
    cosines: Tensor,
    step: int,
) -> None:
    from sae.inspection import comparison_figures, figures  # matplotlib takes a second to import

    geometry = metrics.get("geometry")

    drawn = {
        "fvu_by_components": figures.fvu_by_components(metrics),
        "methods_at_equal_l0": figures.methods_at_equal_l0(metrics),
        "densities": None if densities is None else figures.density_histogram(densities),
        "nearest_neighbours": figures.neighbour_histogram(cosines),
        "neighbours_of_sets": comparison_figures.neighbours_of_sets(geometry) if geometry else None,
        "almost_orthogonal_sets": comparison_figures.almost_orthogonal_sets(geometry) if geometry else None,
        "natural_kurtosis": comparison_figures.natural_kurtosis(metrics),
        "training_curves": figures.training_curves(
            Path(writer.get_logdir()), None if name == SINGLE else name
        ),
    }
    for shows, figure in drawn.items():
        if figure is not None:
            writer.add_figure(curve("figures", name, shows), figure, step)


def _hyperparameters(
    trainer: lightning.Trainer, pl_module: SparseAutoencoderModule, metrics: dict[str, Any]
) -> dict[str, int | float | str]:
    data: ActivationDataModule = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
    each = pl_module.dictionaries
    values = {
        "kind": _joined([type(dictionary).__name__ for dictionary in each.values()]),
        "n_latents": _joined([dictionary.n_latents for dictionary in each.values()]),
        "k": _joined([dictionary.config.get("k") for dictionary in each.values()]),
        "target_l0": _joined([dictionary.config.get("target_l0") for dictionary in each.values()]),
        "control": _joined([pl_module.controls.of(name) for name in each]),
        "lr": _joined([pl_module.lr_of(name) for name in each]),
        "batch_size": data.batch_size,
        "hookpoint": data.hookpoint,
        "model": data.cache.manifest["model"],
        "seed": metrics["seed"],
        "max_steps": trainer.max_steps,
    }
    return {name: value for name, value in values.items() if value is not None}


def _joined(values: list[Any]) -> Any:
    """The value that all dictionaries have, or all of theirs in words."""
    return values[0] if len(set(values)) == 1 else ", ".join("-" if v is None else f"{v}" for v in values)


def _replace_hparams(folder: Path, values: dict[str, int | float | str], metrics: list[str]) -> None:
    """Makes the run a row of the HPARAMS tab, its metrics read from the scalars of these tags.

    In an event file of its own: TensorBoard keeps the first such record of a run, and one that is
    continued to more steps must show the last.
    """
    for earlier in folder.glob(f"events.*{_HPARAMS}"):
        earlier.unlink()
    writer = FileWriter(str(folder), filename_suffix=_HPARAMS)
    for summary in hparams(values, dict.fromkeys(metrics, 0.0)):
        writer.add_summary(summary)
    writer.close()
