"""How fast dictionaries learn: Adam's rate for each, its rise and its fall."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from sae.dictionaries import SparseAutoencoder
from sae.errors import InputError
from sae.training.row_sparse_adam import RowSparseAdam
from sae.training.schedules import learning_rate_for, warmup_then_decay


@dataclass(frozen=True)
class Pace:
    """Settings of the optimiser."""

    lr: float | None = None
    """None = the recipe's rule for the width and the length of the run."""
    warmup_steps: int = 100
    decay_share: float = 0.2
    ema_decay: float | None = None
    """Share of the old that the running mean of the weights keeps at each step; None = no mean."""
    row_sparse: bool = False
    """Whether Adam leaves latents alone that had no part in a step (`RowSparseAdam`)."""

    def check(self) -> None:
        """Raises `InputError` for a value out of range."""
        for name, value, rule, good in (
            ("lr", self.lr, "positive and finite", self.lr is None or 0 < self.lr < float("inf")),
            ("warmup_steps", self.warmup_steps, "at least 0", self.warmup_steps >= 0),
            ("decay_share", self.decay_share, "in [0, 1]", 0 <= self.decay_share <= 1),
            ("ema_decay", self.ema_decay, "in (0, 1)", self.ema_decay is None or 0 < self.ema_decay < 1),
        ):
            if not good:
                raise InputError(f"`{name}` must be {rule}, got {name}={value}.")

    def lr_of(self, dictionary: SparseAutoencoder, max_steps: int) -> float:
        """Adam's rate at its peak in a run of so many steps."""
        return self.lr or learning_rate_for(dictionary.n_latents, max_steps)

    def adam(self, dictionaries: Iterable[SparseAutoencoder], max_steps: int) -> torch.optim.Adam:
        """Fused Adam, with a group of parameters for each dictionary."""
        groups = [{"params": list(d.parameters()), "lr": self.lr_of(d, max_steps)} for d in dictionaries]
        kind = RowSparseAdam if self.row_sparse else torch.optim.Adam
        return kind(groups, betas=(0.9, 0.999), fused=True)

    def schedule(self, optimizer: torch.optim.Optimizer, max_steps: int) -> torch.optim.lr_scheduler.LambdaLR:
        """Linear warm-up, and decay to zero over the end of the run, for all groups alike."""

        def factor(step: int) -> float:
            return warmup_then_decay(
                step, warmup_steps=self.warmup_steps, max_steps=max_steps, decay_share=self.decay_share
            )

        return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
