"""What a run leaves behind: metrics.json after each validation, the dictionary at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from sae.activations import ActivationDataModule
from sae.callbacks.throughput import Throughput
from sae.dictionaries import save_dictionary
from sae.files import write_json
from sae.training import SparseAutoencoderModule


class RunFolder(lightning.Callback):
    """Writes config.yaml, metrics.json and dictionary/ into the run folder, each atomically."""

    def __init__(self, folder: Path, save_config: Callable[[Path], None], seed: int | None) -> None:
        """Describes the run.

        Args:
            folder: the run folder.
            save_config: writes config.yaml to the path it is given; called once training can start.
            seed: goes into metrics.json.
        """
        self.folder = folder
        self._save_config = save_config
        self._seed = seed
        self._begin = time.monotonic()
        self._earlier_s = 0.0  # wall time of the sessions that this one resumes

    def state_dict(self) -> dict[str, Any]:
        """Wall time so far."""
        return {"wall_s": self._wall_s()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues counting wall time."""
        self._earlier_s = state_dict["wall_s"]

    @rank_zero_only
    def on_fit_start(self, trainer: lightning.Trainer, pl_module: SparseAutoencoderModule) -> None:
        """Everything could be built: the folder becomes a run."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self._save_config(self.folder / "config.yaml")

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: SparseAutoencoderModule) -> None:
        """Metrics so far."""
        if not trainer.sanity_checking:
            self._write_metrics(trainer, pl_module, finished=False)

    @rank_zero_only
    def on_fit_end(self, trainer: lightning.Trainer, pl_module: SparseAutoencoderModule) -> None:
        """The trained dictionary."""
        data: ActivationDataModule = trainer.datamodule  # pyright: ignore
        save_dictionary(
            pl_module.dictionary,
            self.folder / "dictionary",
            hookpoint=data.hookpoint,
            model=data.cache.manifest["model"],
        )

    @rank_zero_only
    def on_exception(
        self, trainer: lightning.Trainer, pl_module: SparseAutoencoderModule, exception: BaseException
    ) -> None:
        """Says where an interrupted run stands."""
        if isinstance(exception, KeyboardInterrupt):
            kept = (self.folder / "checkpoints" / "last.ckpt").is_file()
            again = "resumes from the last checkpoint" if kept else "starts over (no validation was reached)"
            print(f"\nstopped at step {trainer.global_step}; the same command {again}.", file=sys.stderr)

    def on_test_end(self, trainer: lightning.Trainer, pl_module: SparseAutoencoderModule) -> None:
        """The final metrics."""
        self._write_metrics(trainer, pl_module, finished=True)

    @rank_zero_only
    def _write_metrics(
        self, trainer: lightning.Trainer, pl_module: SparseAutoencoderModule, finished: bool
    ) -> None:
        assert pl_module.scores is not None
        dictionary = pl_module.dictionary
        throughput = [c.tokens_per_s for c in trainer.callbacks if isinstance(c, Throughput)]
        metrics: dict[str, Any] = {
            "finished": finished,
            **pl_module.scores._asdict(),
            "steps": trainer.global_step,
            "tokens_seen": trainer.global_step * pl_module.tokens_per_step,
            "tokens_per_s": throughput[0] if throughput else None,
            "wall_s": self._wall_s(),
            "d_model": dictionary.d_model,
            "n_latents": dictionary.n_latents,
            "seed": self._seed,
            "baselines": {},
        }
        for callback in trainer.callbacks:
            if hasattr(callback, "metrics"):
                for key, value in callback.metrics().items():
                    metrics[key] = metrics.get(key, {}) | value
        write_json(self.folder / "metrics.json", metrics)
        _draw_methods_together(trainer, metrics)

    def _wall_s(self) -> float:
        return self._earlier_s + time.monotonic() - self._begin


def _draw_methods_together(trainer: lightning.Trainer, metrics: dict[str, Any]) -> None:
    """One TensorBoard chart per quantity with every method in it, each in its own colour."""
    baselines = metrics["baselines"]
    for logger in trainer.loggers:
        if not isinstance(logger, TensorBoardLogger) or not baselines:
            continue
        at_equal_l0 = {"sae": metrics["fvu"]} | {name: row["fvu"] for name, row in baselines.items()}
        logger.experiment.add_scalars("fvu_at_equal_l0", at_equal_l0, metrics["steps"])
        if metrics["finished"]:  # x = number of components
            for name, row in baselines.items():
                for components, fvu in sorted(
                    row["fvu_by_components"].items(), key=lambda pair: int(pair[0])
                ):
                    logger.experiment.add_scalars("fvu_by_components", {name: fvu}, int(components))
