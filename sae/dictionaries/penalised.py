"""What kinds have in common whose L0 follows from a penalty: a target, or a coefficient."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.dictionaries.autoencoder import TrainingCode
from sae.dictionaries.linear_encoder import LinearEncoder
from sae.errors import InputError

_FOLLOWS = 0.04
"""Share of the logarithmic error of L0 by which all latents' thresholds move at every step."""


class Penalised(LinearEncoder):
    """loss = reconstruction + coefficient * penalty.

    With `sparsity_coefficient` the coefficient is fixed, and L0 is what comes of it. With `target_l0` a
    controller moves it until that L0 is reached (`sae.training.sparsity`), and latents begin at equal
    rates that add up to the target, so that the code is sparse from the first step. What is left of the
    error when the learning rate falls, and the coefficient has no more effect, is taken up by moving the
    thresholds of all latents together, a little at every step.
    """

    news: ClassVar[tuple[str, ...]] = ("l0",)
    recent_l0: Tensor

    default_revival: ClassVar[tuple[str, ...]] = ("resample",)
    default_l0_start: ClassVar[float] = 3.0
    warms_up_for = 0.05
    """Share of the run over which a fixed coefficient rises from zero."""

    def __init__(
        self,
        d_model: int,
        n_latents: int,
        target_l0: int | float | None,
        sparsity_coefficient: int | float | None,
    ) -> None:
        super().__init__(d_model, n_latents)
        if (target_l0 is None) == (sparsity_coefficient is None):
            raise InputError(
                "one of `target_l0` and `sparsity_coefficient` must be given, got"
                f" target_l0={target_l0} and sparsity_coefficient={sparsity_coefficient}."
            )
        for name, value in (("target_l0", target_l0), ("sparsity_coefficient", sparsity_coefficient)):
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
                raise InputError(f"`{name}` must be a number, got {value!r}.")
        if target_l0 is not None and not 0 < target_l0 <= n_latents:
            raise InputError(f"`target_l0` must be in (0, n_latents={n_latents}], got {target_l0}.")
        if sparsity_coefficient is not None:
            check_coefficient(sparsity_coefficient)
        self.target_l0, self.sparsity_coefficient = target_l0, sparsity_coefficient
        self.register_buffer("recent_l0", torch.tensor(float(target_l0 or 0.0)))

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return self.arguments(target_l0=self.target_l0, sparsity_coefficient=self.sparsity_coefficient)

    @property
    def entries_per_row(self) -> float:
        """Latents that fire per row: the target; all of them where nobody can know."""
        return float(self.target_l0 or self.n_latents)

    @property
    def l0_now(self) -> float:
        """The target at this point of the training."""
        return min(float(self.n_latents), float(self.target_l0 or self.n_latents) * self.l0_factor)

    def is_near_target(self, l0: float) -> bool:
        """Whether an L0 is within 2 % of the target; yes, where there is none."""
        return self.target_l0 is None or abs(l0 / self.target_l0 - 1) < 0.02

    @property
    def begins_with_rows(self) -> bool:
        """Yes, where a target says how many are to fire."""
        return self.target_l0 is not None

    def _l0_of(self, fires: Tensor, rows: int) -> dict[str, Tensor]:
        """The news of a batch in which these entries fire."""
        return {"l0": fires.detach().sum().to(self.b_enc.dtype) / rows}

    @abstractmethod
    def penalty(self, code: TrainingCode) -> Float[Tensor, ""]:
        """What the coefficient multiplies: a sum over latents, a mean over rows."""

    @torch.no_grad()
    def begin(self, u: Float[Tensor, "rows d_model"]) -> None:
        """Lets every latent fire equally often, `target_l0` a row together."""
        if self.target_l0 is None:
            return
        v = self.encoder_input(u)
        below = max(1, len(v) - round(len(v) * self.l0_now / self.n_latents))
        levels = [(rows @ v.T).kthvalue(below, dim=1).values for rows in self.W_enc_rows.split(1024)]
        self._fire_above(torch.cat(levels).to(self.b_enc))
        self.recent_l0.fill_(self.l0_now)

    @torch.no_grad()
    def hear(self, news: Mapping[str, Tensor]) -> None:
        """Remembers the L0 of the steps before; with a target, all thresholds follow it, if they learn."""
        l0 = news["l0"].to(self.recent_l0)
        known = ~l0.isnan()
        self.recent_l0.lerp_(torch.where(known, l0, self.recent_l0), 0.1)
        if self.target_l0 is not None and self.b_enc.requires_grad:
            excess = (self.recent_l0.clamp_min(1e-3) / self.l0_now).log().clamp(-1.0, 1.0)
            self._raise_thresholds(_FOLLOWS * excess * known)

    def _raise_thresholds(self, by: Float[Tensor, ""]) -> None:
        """Lets all latents fire on less, for by > 0; in parts of the length of their encoder rows."""
        self.b_enc.sub_(by * self.W_enc_rows.norm(dim=1))

    @torch.no_grad()
    def set_latents(self, ids: Int[Tensor, " some"], directions: Float[Tensor, "some d_model"]) -> None:
        """As all do, with the median bias: without one they would fire on half of the rows."""
        bias = self.b_enc.median()
        super().set_latents(ids, directions)
        self.b_enc[ids] = bias

    @abstractmethod
    def _fire_above(self, levels: Float[Tensor, " n_latents"]) -> None:
        """Sets each latent to fire where its v @ W_enc is above a level."""


def check_coefficient(value: int | float) -> int | float:
    """The value; raises `InputError` unless it can weigh a penalty."""
    if not 0 <= value < float("inf"):
        raise InputError(f"`sparsity_coefficient` must be at least 0 and finite, got {value}.")
    return value
