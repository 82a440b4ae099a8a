"""Settings of Lightning's Trainer that this training cannot be run with, and what Lightning need not say."""

from __future__ import annotations

import logging
import warnings

import lightning

from sae.errors import InputError

_PRECISIONS = ("32-true", "bf16-mixed", "64-true")


def check_trainer(trainer: lightning.Trainer) -> None:
    """Raises `InputError` for settings of the Trainer that this training cannot be run with."""
    if trainer.precision not in _PRECISIONS:
        raise InputError(
            f"`trainer.precision` {trainer.precision} is not supported (weights stay in full precision);"
            f" use {', '.join(_PRECISIONS)}."
        )
    if trainer.log_every_n_steps < 1:
        raise InputError(
            f"`trainer.log_every_n_steps` must be at least 1, got {trainer.log_every_n_steps};"
            " `trainer.logger=false` logs nothing."
        )
    if trainer.max_steps == -1 and trainer.max_epochs in (None, -1):
        raise InputError(
            "`trainer.max_steps` or `trainer.max_epochs` must be given: the schedule needs an end."
        )


def hush_lightning() -> None:
    """Turns off advertisements, device lists and a deprecation inside Lightning; its warnings stay."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*is deprecated")
    warnings.filterwarnings("ignore", message="The `srun` command is available")  # a login node has it too
