"""One progress bar for the whole training: steps, rate, time left, the last logged scores."""

from __future__ import annotations

from typing import Any

import lightning
from tqdm import tqdm

_REFRESH_EVERY = 20  # steps


class TrainingBar(lightning.Callback):
    """Counts steps of the whole run on standard error, and shows what logging steps logged.

    It reads tensors only on steps that log, so it never makes a quiet step wait.
    """

    def __init__(self) -> None:
        self._bar: tqdm | None = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Opens the bar at the step that the run is at."""
        total = int(trainer.estimated_stepping_batches)
        done = trainer.global_step
        hidden = not trainer.is_global_zero
        self._bar = tqdm(total=total, initial=done, desc="train", unit=" steps", disable=hidden)

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: lightning.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Moves it."""
        assert self._bar is not None
        if trainer.global_step % trainer.log_every_n_steps == 0:
            shown = {
                name.partition("/")[2]: float(value) for name, value in trainer.progress_bar_metrics.items()
            }
            self._bar.set_postfix(shown, refresh=False)
        if trainer.global_step % _REFRESH_EVERY == 0:
            self._bar.update(trainer.global_step - self._bar.n)

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Closes it."""
        assert self._bar is not None
        self._bar.update(trainer.global_step - self._bar.n)
        self._bar.close()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """Leaves the line, so that what is printed next stands on its own."""
        if self._bar is not None:
            self._bar.close()
