"""What a run leaves behind: metrics.json after each validation, the dictionary at the end."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.utilities import rank_zero_only

from sae.activations import ActivationDataModule
from sae.callbacks.throughput import Throughput
from sae.checkpoints import LAST
from sae.dictionaries import save_dictionary
from sae.errors import DivergedError
from sae.files import write_json
from sae.training import SparseAutoencoderModule

MODEL_LOSS_KEYS = (
    "ce_clean",
    "ce_spliced",
    "ce_mean_ablated",
    "ce_increase",
    "ce_increase_se",
    "kl",
    "ce_tokens",
)
"""Null where the language model is not at hand, or predicts no next token."""


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
        self._last_metrics: dict[str, Any] = {}

    @property
    def last_metrics(self) -> dict[str, Any]:
        """What metrics.json was last given by this process; empty before, and on other ranks than 0."""
        return self._last_metrics

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
            self._write_metrics(trainer, pl_module)

    @rank_zero_only
    def on_fit_end(self, trainer: lightning.Trainer, pl_module: SparseAutoencoderModule) -> None:
        """The trained dictionary."""
        self._save_dictionary(trainer, pl_module, "dictionary")

    def _save_dictionary(
        self, trainer: lightning.Trainer, pl_module: SparseAutoencoderModule, name: str
    ) -> None:
        data: ActivationDataModule = trainer.datamodule  # pyright: ignore
        model = data.cache.manifest["model"]
        save_dictionary(pl_module.dictionary, self.folder / name, hookpoint=data.hookpoint, model=model)

    @rank_zero_only
    def on_exception(
        self, trainer: lightning.Trainer, pl_module: SparseAutoencoderModule, exception: BaseException
    ) -> None:
        """Says where an interrupted run stands; keeps the weights before training diverged."""
        last = self.folder / "checkpoints" / LAST
        if isinstance(exception, KeyboardInterrupt):
            again = (
                "resumes from the last checkpoint" if last.is_file() else "starts over (there is none yet)"
            )
            print(f"\nstopped at step {trainer.global_step}; the same command {again}.", file=sys.stderr)
        if isinstance(exception, DivergedError):
            self._save_dictionary(trainer, pl_module, "before_divergence")
            kept = f"{self.folder / 'before_divergence'} has the weights of the step before"
            print(f"{kept}; {last} is as it was." if last.is_file() else f"{kept}.", file=sys.stderr)

    def on_test_end(self, trainer: lightning.Trainer, pl_module: SparseAutoencoderModule) -> None:
        """The final metrics; the run is finished once `finish` has been called."""
        self._write_metrics(trainer, pl_module)

    @rank_zero_only
    def finish(self) -> None:
        """Says in metrics.json that nothing is left to do, figures and all."""
        if self._last_metrics:
            self._last_metrics = {**self._last_metrics, "finished": True}
            write_json(self.folder / "metrics.json", self._last_metrics)

    @rank_zero_only
    def _write_metrics(self, trainer: lightning.Trainer, pl_module: SparseAutoencoderModule) -> None:
        assert pl_module.scores is not None
        dictionary = pl_module.dictionary
        batches = trainer.fit_loop.epoch_loop.batch_progress.total.completed
        throughput = [c.tokens_per_s for c in trainer.callbacks if isinstance(c, Throughput)]
        metrics: dict[str, Any] = {
            "finished": False,
            **pl_module.scores._asdict(),
            "steps": trainer.global_step,
            "tokens_seen": batches * pl_module.rows.batch_size,
            "tokens_per_s": throughput[0] if throughput else None,
            "wall_s": self._wall_s(),
            "d_model": dictionary.d_model,
            "n_latents": dictionary.n_latents,
            "seed": self._seed,
            **dict.fromkeys(MODEL_LOSS_KEYS),
            "baselines": {},
        }
        for callback in trainer.callbacks:
            if hasattr(callback, "metrics"):
                _merge(metrics, callback.metrics())
        write_json(self.folder / "metrics.json", metrics)
        self._last_metrics = metrics

    def _wall_s(self) -> float:
        return self._earlier_s + time.monotonic() - self._begin


def _merge(into: dict[str, Any], new: dict[str, Any]) -> None:
    """Adds values, and those of dictionaries within to those that are there."""
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value
