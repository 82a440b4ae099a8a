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

AT_EQUAL_L0 = {
    "fvu": "FVU",
    "fvu_without_first_position": "FVU without first position",
    "cosine": "cosine",
    "dead_fraction": "dead fraction",
    "l0": "L0",
}
"""What every validation scores of every method, with the titles of the charts."""
ON_THE_MODEL = {"ce_increase": "CE increase (nats)", "kl": "KL (nats)"}
"""What the end of a run measures of every method where the language model is at hand."""
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
            writer.add_custom_scalars(_layout(trainer, AT_EQUAL_L0))

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
        writer, densities = _writer(trainer), pl_module.densities
        if writer is None or densities is None or trainer.sanity_checking:
            return
        alive = densities[densities > 0].log10().cpu().numpy()
        if len(alive):
            writer.add_histogram("latents/log10_density", alive, trainer.global_step, bins=64)  # pyright: ignore

    def on_test_end(self, trainer: lightning.Trainer, pl_module: SparseAutoencoderModule) -> None:
        """Draws what is known at the end."""
        metrics = next((c.last_metrics for c in trainer.callbacks if isinstance(c, RunFolder)), {})
        writer, step = _writer(trainer), trainer.global_step
        if writer is None or not metrics:
            return
        methods = {"test": metrics} | {f"baseline/{n}": row for n, row in metrics["baselines"].items()}
        measured = [key for key in ON_THE_MODEL if metrics.get(key) is not None]
        for prefix, row in methods.items():
            for key in measured:
                if row.get(key) is not None:
                    writer.add_scalar(f"{prefix}/{key}", row[key], step)
        titles = AT_EQUAL_L0 | {key: ON_THE_MODEL[key] for key in measured}
        writer.add_custom_scalars(_layout(trainer, titles))  # the last one counts
        with torch.inference_mode():
            cosines = nearest_neighbour_cosines(pl_module.dictionary.directions).float().cpu()
        bins = np.linspace(0, 1, 51).tolist()
        writer.add_histogram("latents/nearest_neighbour_cosine", cosines.numpy(), step, bins=bins)
        writer.flush()
        _add_figures(writer, metrics, pl_module.densities, cosines, step)
        writer.flush()
        _replace_hparams(
            Path(writer.get_logdir()),
            _hyperparameters(trainer, pl_module, metrics),
            [f"test/{key}" for key in ("fvu", "l0", "dead_fraction", "cosine", "ce_increase")]
            + [f"baseline/{name}/fvu" for name in metrics["baselines"]],
        )


def _writer(trainer: lightning.Trainer) -> SummaryWriter | None:
    """What the run's TensorBoard logger writes with, on rank 0."""
    if not trainer.is_global_zero:
        return None
    return next((log.experiment for log in trainer.loggers if isinstance(log, TensorBoardLogger)), None)


def _layout(trainer: lightning.Trainer, titles: dict[str, str]) -> dict[str, Any]:
    """One chart for each quantity; tags are regular expressions that match from the beginning."""
    methods = ["(val|test)"]
    methods += [f"baseline/{c.name}" for c in trainer.callbacks if isinstance(c, BaselineCallback)]
    charts = {
        title: ["Multiline", [f"^{method}/{key}$" for method in methods]] for key, title in titles.items()
    }
    return {"Every method on the held-out rows, at equal L0": charts}


def _add_figures(
    writer: SummaryWriter, metrics: dict[str, Any], densities: Tensor | None, cosines: Tensor, step: int
) -> None:
    from sae.inspection import figures  # matplotlib takes a second to import

    drawn = {
        "fvu_by_components": figures.fvu_by_components(metrics),
        "methods_at_equal_l0": figures.methods_at_equal_l0(metrics),
        "densities": None if densities is None else figures.density_histogram(densities),
        "nearest_neighbours": figures.neighbour_histogram(cosines),
        "training_curves": figures.training_curves(Path(writer.get_logdir())),
    }
    for name, figure in drawn.items():
        if figure is not None:
            writer.add_figure(f"figures/{name}", figure, step)


def _hyperparameters(
    trainer: lightning.Trainer, pl_module: SparseAutoencoderModule, metrics: dict[str, Any]
) -> dict[str, int | float | str]:
    data: ActivationDataModule = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
    dictionary = pl_module.dictionary
    values = {
        "kind": type(dictionary).__name__,
        "n_latents": dictionary.n_latents,
        "k": dictionary.config.get("k"),
        "lr": pl_module.lr,
        "batch_size": data.batch_size,
        "hookpoint": data.hookpoint,
        "model": data.cache.manifest["model"],
        "seed": metrics["seed"],
        "max_steps": trainer.max_steps,
    }
    return {name: value for name, value in values.items() if value is not None}


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
