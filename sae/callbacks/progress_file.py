"""progress.json: where a run stands, for whoever looks from outside."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.utilities import rank_zero_only

from sae.callbacks.throughput import Throughput
from sae.files import write_json
from sae.launch import explained
from sae.signals import Stopped

SECONDS_APART = 5.0


class ProgressFile(lightning.Callback):
    """Writes progress.json into the run folder, on rank 0, every few seconds on steps that log."""

    def __init__(self, folder: Path) -> None:
        """Describes it: `folder` is the run's."""
        self._path = folder / "progress.json"
        self._written = 0.0
        self._max_steps: int | None = None
        self._metrics: dict[str, float] = {}

    @rank_zero_only
    def on_fit_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """The folder exists from now on."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._write(trainer, "starting")

    @rank_zero_only
    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Steps are taken."""
        self._max_steps = int(trainer.estimated_stepping_batches)
        self._write(trainer, "running")

    @rank_zero_only
    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Now and then."""
        due = trainer.global_step % trainer.log_every_n_steps == 0
        if due and time.monotonic() - self._written >= SECONDS_APART:
            self._write(trainer, "running")

    @rank_zero_only
    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """With the held-out scores."""
        if not trainer.sanity_checking:
            self._write(trainer, "running")

    @rank_zero_only
    def on_test_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """All is done."""
        self._write(trainer, "finished")

    @rank_zero_only
    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """How it ended."""
        if self._path.parent.is_dir():
            stopped = isinstance(exception, (Stopped, KeyboardInterrupt))
            told = explained(exception) if isinstance(exception, RuntimeError) else None
            why = str(told or exception).partition("\n")[0] or type(exception).__name__
            with contextlib.suppress(OSError):  # the disk may be what is wrong
                self._write(trainer, "stopped" if stopped else "failed", why)

    def _write(self, trainer: lightning.Trainer, state: str, why: str | None = None) -> None:
        throughput = next((c for c in trainer.callbacks if isinstance(c, Throughput)), Throughput())  # pyright: ignore
        # Lightning forgets those of the training when the test begins.
        self._metrics |= {
            name: float(value) for name, value in trainer.callback_metrics.items() if "/" in name
        }
        finite = {name: value for name, value in self._metrics.items() if abs(value) < float("inf")}
        values = {
            "state": state,
            "why": why,
            "step": trainer.global_step,
            "max_steps": self._max_steps or trainer.max_steps,
            "time": time.time(),
            "steps_per_s": throughput.steps_per_s,
            "tokens_per_s": throughput.tokens_per_s,
            "data_wait": throughput.data_wait,
            "memory_bytes": throughput.memory_bytes,
            "metrics": finite,
        }
        write_json(self._path, values)
        self._written = time.monotonic()
