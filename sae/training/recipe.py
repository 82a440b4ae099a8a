"""How a dictionary is trained: what can be chosen, and what is chosen where nothing is said."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

from sae.dictionaries import SparseAutoencoder
from sae.errors import InputError
from sae.training.revival import Way, check_ways


@dataclass(frozen=True)
class Recipe:
    """Settings of the loss and of the revival of dead latents; None = the kind's own, or a rule."""

    revival: tuple[Way, ...] | None = None
    auxk_coefficient: float = 1 / 32
    pre_act_coefficient: float = 0.01
    resample_every: int | None = None
    """Optimiser steps; None = a two-hundredth of the run, at most 2,500."""
    dead_after_tokens: int | None = None
    """None = 5 % of the run, at most 10 million; for resampling, if that is less, one of its intervals."""
    l0_start: float | None = None
    """L0 at the first step over that at the end; None = the kind's own."""

    def check(self) -> None:
        """Raises `InputError` for a value out of range."""
        for name in ("auxk_coefficient", "pre_act_coefficient"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"`{name}` must be at least 0, got {name}={getattr(self, name)}.")
        for name in ("resample_every", "dead_after_tokens"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise InputError(f"`{name}` must be positive, got {name}={value}.")
        if self.l0_start is not None and not 1 <= self.l0_start < float("inf"):
            raise InputError(f"`l0_start` must be at least 1, got {self.l0_start}.")
        if self.revival is not None:
            check_ways(self.revival)

    def ways_for(self, dictionary: SparseAutoencoder) -> tuple[Way, ...]:
        """The ways of revival for a kind: as said, or its own."""
        return cast(tuple[Way, ...], dictionary.default_revival) if self.revival is None else self.revival

    def dead_after(self, planned_tokens: int) -> int:
        """Tokens without firing after which a latent counts as dead."""
        return self.dead_after_tokens or max(1, min(10_000_000, planned_tokens // 20))

    def resampling_interval(self, planned_steps: int) -> int:
        """Steps between two resamplings."""
        return self.resample_every or max(1, min(2500, planned_steps // 200))

    def l0_start_for(self, dictionary: SparseAutoencoder) -> float:
        """L0 at the first step over that at the end; the kind's own only as far as a quarter of all latents.

        Raises:
            InputError: if more latents would have to fire than there are.
        """
        most = dictionary.n_latents / dictionary.entries_per_row
        if self.l0_start is None:
            return max(1.0, min(dictionary.default_l0_start, most / 4))
        if self.l0_start > max(1.0, most):
            raise InputError(
                f"`l0_start` must be at most {most:.4g}, where all {dictionary.n_latents:,} latents fire, got"
                f" {self.l0_start}."
            )
        return self.l0_start

    def l0_factor(self, dictionary: SparseAutoencoder, step: int, planned_steps: int) -> float:
        """L0 at a step over that at the end: falls by equal factors over the first half of the run.

        With more latents in each row, more of them find something to stand for before they compete.
        """
        return self.l0_start_for(dictionary) ** max(0.0, 1 - 2 * step / planned_steps)
