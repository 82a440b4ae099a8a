"""Tokens per second, the same way for every run."""

from __future__ import annotations

import time
from typing import Any

import lightning
import torch

WARMUP_STEPS = 20
"""Steps left out at the start of a process, while caches and allocators fill."""


class Throughput(lightning.Callback):
    """Measures tokens over wall time after the first steps of this process.

    The device is waited for at both ends, waiting for data counts, validation does not.
    """

    def __init__(self) -> None:
        self._steps = 0
        self._begin: float | None = None
        self._paused = 0.0
        self._pause_begin = 0.0
        self.tokens_per_s: float | None = None

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Starts the clock after the warm-up; reports on logging steps."""
        self._steps += 1
        if self._steps == WARMUP_STEPS:
            self._begin = _now(pl_module)
        elif self._begin is not None and trainer.global_step % trainer.log_every_n_steps == 0:
            self._update(trainer, pl_module)
            self.log("train/tokens_per_s", self.tokens_per_s)

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Stops the clock."""
        self._pause_begin = _now(pl_module)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Starts it again."""
        if self._begin is not None:
            self._paused += _now(pl_module) - self._pause_begin

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Takes the final figure."""
        if self._begin is not None and self._steps > WARMUP_STEPS:
            self._update(trainer, pl_module)

    def _update(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert self._begin is not None
        seconds = _now(pl_module) - self._begin - self._paused
        tokens = (self._steps - WARMUP_STEPS) * trainer.datamodule.batch_size  # pyright: ignore[reportAttributeAccessIssue]
        self.tokens_per_s = tokens / seconds if seconds > 0 else None


def _now(pl_module: lightning.LightningModule) -> float:
    if pl_module.device.type == "cuda":
        torch.cuda.synchronize(pl_module.device)
    return time.perf_counter()
