"""What a run leaves behind: metrics.json after each validation, its dictionaries at the end."""

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
from sae.dictionaries import Dictionary, save_dictionary
from sae.dictionaries.penalised import Penalised
from sae.errors import DivergedError
from sae.files import write_json
from sae.training import SparseAutoencoderModule
from sae.training.names import SINGLE

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
    """Writes config.yaml, metrics.json and dictionary/ into the run folder, each atomically.

    Several dictionaries go to dictionaries/<name>/, and their scores to metrics.json["dictionaries"][name].
    """

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
        """The trained dictionary, or several."""
        self._save(trainer, pl_module, self.folder / "dictionary", self.folder / "dictionaries")

    def _save(
        self, trainer: lightning.Trainer, pl_module: SparseAutoencoderModule, single: Path, several: Path
    ) -> None:
        data: ActivationDataModule = trainer.datamodule  # pyright: ignore
        model = data.cache.manifest["model"]
        with pl_module.averaged():
            for name, dictionary in pl_module.dictionaries.items():
                folder = single if name == SINGLE else several / name
                save_dictionary(dictionary, folder, hookpoint=data.hookpoint, model=model)

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
            told = "the weights of the step before are not finite either"
            if all(
                p.isfinite().all()
                for d in pl_module.dictionaries.values()
                for p in d.saved_tensors().values()
            ):
                kept = self.folder / "before_divergence"
                self._save(trainer, pl_module, kept, kept)
                told = f"{kept} has the weights of the step before"
            print(f"{told}; {last} is as it was." if last.is_file() else f"{told}.", file=sys.stderr)

    def on_test_end(self, trainer: lightning.Trainer, pl_module: SparseAutoencoderModule) -> None:
        """The final metrics; the run is finished once `finish` has been called."""
        self._write_metrics(trainer, pl_module)
        for name, dictionary in pl_module.dictionaries.items():
            if trainer.is_global_zero and (
                told := missed_target(name, dictionary, pl_module.held_out.scores[name].l0)
            ):
                print(told, file=sys.stderr)

    @rank_zero_only
    def finish(self) -> None:
        """Says in metrics.json that nothing is left to do, figures and all."""
        if self._last_metrics:
            self._last_metrics = {**self._last_metrics, "finished": True}
            write_json(self.folder / "metrics.json", self._last_metrics)

    @rank_zero_only
    def _write_metrics(self, trainer: lightning.Trainer, pl_module: SparseAutoencoderModule) -> None:
        batches = trainer.fit_loop.epoch_loop.batch_progress.total.completed
        throughput = [c.tokens_per_s for c in trainer.callbacks if isinstance(c, Throughput)]
        run = {
            "steps": trainer.global_step,
            "tokens_seen": batches * pl_module.rows.batch_size,
            "tokens_per_s": throughput[0] if throughput else None,
            "wall_s": self._wall_s(),
            "d_model": pl_module.rows.d_model,
        }
        found = {name: self._metrics_of(name, trainer, pl_module) for name in pl_module.learners}
        if SINGLE in found:
            scores, others = found[SINGLE]
            sizes = {"n_latents": others.pop("n_latents"), "seed": self._seed}
            metrics = {"finished": False, **scores, **run, **sizes, **others}
        else:
            several = {name: scores | others for name, (scores, others) in found.items()}
            metrics = {"finished": False, **run, "seed": self._seed, "dictionaries": several}
        write_json(self.folder / "metrics.json", metrics)
        self._last_metrics = metrics

    def _metrics_of(
        self, name: str, trainer: lightning.Trainer, pl_module: SparseAutoencoderModule
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Held-out scores of a dictionary, and what else is known of it."""
        others: dict[str, Any] = {
            "n_latents": pl_module.dictionaries[name].n_latents,
            **dict.fromkeys(MODEL_LOSS_KEYS),
            "baselines": {},
        }
        for callback in trainer.callbacks:  # pyright: ignore[reportAttributeAccessIssue]
            if hasattr(callback, "metrics"):
                _merge(others, callback.metrics(name))
        return pl_module.held_out.scores[name]._asdict(), others

    def _wall_s(self) -> float:
        return self._earlier_s + time.monotonic() - self._begin


def missed_target(name: str, dictionary: Dictionary, l0: float) -> str:
    """What is to be said of a held-out L0 that is not near its target; else nothing."""
    if not isinstance(dictionary, Penalised) or dictionary.is_near_target(l0):
        return ""
    trained, why = float(dictionary.recent_l0), "more steps come nearer"
    if dictionary.is_near_target(trained):
        why = f"on the last rows trained on it was {trained:.4g}, so the held-out ones differ from them"
    which = "L0" if name == SINGLE else f"L0 of `{name}`"
    return f"{which} is {l0:.4g} on the held-out rows, its target {dictionary.target_l0}: {why}."


def _merge(into: dict[str, Any], new: dict[str, Any]) -> None:
    """Adds values, and those of dictionaries within to those that are there."""
    for key, value in new.items():
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = value
