"""Checkpoints between two steps, and the end of a run that was asked to stop."""

from __future__ import annotations

import random
import signal
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Checkpoint

from sae.checkpoints import BEST, LAST, link
from sae.errors import InputError
from sae.ops.group import Group
from sae.signals import STOP_SIGNALS, Stopped
from sae.training import SparseAutoencoderModule


class Checkpoints(Checkpoint):
    """checkpoints/last.ckpt every so many steps and after every validation, best.ckpt by held-out FVU.

    Where several dictionaries are trained, best.ckpt is that with the least mean of their FVUs.

    A checkpoint is taken between two steps, when all that belongs to the one before is done: its logs, its
    validation. So a run that continues from it neither repeats nor leaves out anything. Signals are heeded
    at the same place, by all ranks after the same step.
    """

    def __init__(self, folder: Path, every: int) -> None:
        """Describes them.

        Args:
            folder: where they go.
            every: steps between them; a killed process loses at most so many.

        Raises:
            InputError: if `every` is not positive.
        """
        if every < 1:
            raise InputError(f"`checkpoint_every` must be at least 1 step, got {every}.")
        self.folder, self.every = folder, every
        self._best = float("inf")
        self._validated = False
        self._saved_at = self._begun_at = -1
        self._between_steps = False
        self._generators: list[dict[str, Any]] = []

    def state_dict(self) -> dict[str, Any]:
        """The best score so far."""
        return {"best": self._best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes it."""
        self._best = state_dict["best"]

    def on_train_start(self, trainer: lightning.Trainer, pl_module: SparseAutoencoderModule) -> None:
        """Takes the signals from Lightning, and the random generators from the checkpoint."""
        # Lightning asks all ranks before every step whether one got SIGTERM: a collective and a wait on the
        # device that the gradients make unnecessary.
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None
        STOP_SIGNALS.install()
        STOP_SIGNALS.steps_are_taken = True
        self._saved_at = self._begun_at = trainer.global_step
        if trainer.global_rank < len(self._generators):
            _set_generators(self._generators[trainer.global_rank])
        elif self._generators and trainer.is_global_zero is False:
            torch.manual_seed(torch.initial_seed() + trainer.global_rank)  # a rank that was not there before

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: SparseAutoencoderModule) -> None:
        """There is something to save; was one of the ranks asked to stop meanwhile?"""
        if trainer.sanity_checking:
            return
        self._validated = True
        self._ask_ranks(pl_module)

    def on_train_batch_start(
        self, trainer: lightning.Trainer, pl_module: SparseAutoencoderModule, batch: Any, batch_idx: int
    ) -> None:
        """Between two steps: saves what is due, heeds signals."""
        step = trainer.global_step
        if step != self._begun_at:  # not between the batches of one step
            self._begun_at = step
            self._between_steps = True
            if self._validated or step % self.every == 0 or pl_module.stopping:
                self._save(trainer, pl_module)
            self._between_steps = False
            self._stop_if_asked(trainer, pl_module)
        # A restored loop does not know whether it had counted the step that it was saved after.
        trainer.fit_loop.epoch_loop._batches_that_stepped = step
        received = STOP_SIGNALS.received
        pl_module.asked_to_stop = received is not None
        pl_module.asked_to_requeue = received == signal.SIGUSR1

    def on_train_end(self, trainer: lightning.Trainer, pl_module: SparseAutoencoderModule) -> None:
        """The last one."""
        self._save(trainer, pl_module)
        STOP_SIGNALS.steps_are_taken = False
        self._ask_ranks(pl_module)  # a signal may have come after the last step had begun
        self._stop_if_asked(trainer, pl_module)

    def on_test_start(self, trainer: lightning.Trainer, pl_module: SparseAutoencoderModule) -> None:
        """Takes the signals back from Lightning."""
        STOP_SIGNALS.install()

    def on_exception(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, exception: BaseException
    ) -> None:
        """No more steps are taken."""
        STOP_SIGNALS.steps_are_taken = False

    def on_save_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Adds the random generators of all ranks; lets Lightning's loops stand between two steps."""
        checkpoint["generators"] = Group.of_training(pl_module.device).objects(_generators())
        if self._between_steps:
            # The next batch has been fetched, and is not part of what is saved.
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
            for counts in (progress["total"], progress["current"]):
                counts["ready"] = counts["completed"]
            progress["is_last_batch"] = False
        # Lightning would give the loader the position of the batch fetched; the datamodule knows better.
        checkpoint["loops"]["fit_loop"]["state_dict"].pop("combined_loader", None)

    def on_load_checkpoint(
        self, trainer: lightning.Trainer, pl_module: lightning.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Keeps them until training starts."""
        self._generators = checkpoint["generators"]

    def _ask_ranks(self, pl_module: SparseAutoencoderModule) -> None:
        """Where no gradients are sent that could carry it."""
        group, received = Group.of_training(pl_module.device), STOP_SIGNALS.received
        pl_module.stopping |= group.any(received is not None)
        pl_module.requeueing |= group.any(received == signal.SIGUSR1)

    def _save(self, trainer: lightning.Trainer, pl_module: SparseAutoencoderModule) -> None:
        is_best = self._validated and self._is_best(pl_module.held_out.mean_fvu)
        self._validated = False
        if trainer.global_step == self._saved_at and not is_best:
            return
        pl_module.catch_up()  # nothing is saved of a step that went wrong
        trainer.save_checkpoint(self.folder / LAST)
        self._saved_at = trainer.global_step
        if is_best and trainer.is_global_zero:
            link(self.folder / LAST, self.folder / BEST)

    def _is_best(self, fvu: float | None) -> bool:
        if fvu is None or fvu >= self._best:
            return False
        self._best = fvu
        return True

    def _stop_if_asked(self, trainer: lightning.Trainer, pl_module: SparseAutoencoderModule) -> None:
        """Ends the run where any rank was asked to, after the same step on all of them."""
        if not pl_module.stopping:
            return
        received = STOP_SIGNALS.received or signal.SIGTERM
        signum = signal.SIGUSR1 if pl_module.requeueing else received
        raise Stopped(signum, f"after step {trainer.global_step:,}; checkpoint saved")


def _generators() -> dict[str, Any]:
    """States of the random generators, as plain values and tensors."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": list(random.getstate()),
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def _set_generators(states: dict[str, Any]) -> None:
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
