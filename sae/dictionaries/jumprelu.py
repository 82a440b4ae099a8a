"""JumpReLU: a latent fires where its pre-activation is above a threshold of its own, which is learned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae.dictionaries.autoencoder import TrainingCode
from sae.dictionaries.penalised import Penalised, check_coefficient
from sae.errors import InputError
from sae.ops.group import ALONE, Group
from sae.ops.selection import above
from sae.ops.sparse import SparseLatents


class JumpReLU(Penalised):
    """latents = pre_acts where pre_acts > threshold, else 0.

    A step has no useful gradient. Within half a bandwidth of the threshold it is taken to be a ramp: so
    thresholds learn, and so do W_enc and b_enc, since pre-activation and threshold count alike with
    opposite signs. Entries outside of that have the gradients of a plain sparse code, and cost the same.

    penalty "step": L0 itself. "tanh": the sum of tanh(4 * latents), which also pushes small latents down.
    "quadratic": (L0 / target_l0 - 1)^2, which pulls from both sides; so that ranks and accumulated batches
    add up, the factor in front of L0's gradient is taken at the mean L0 of the steps before.

    References:
        Jumping Ahead: Improving Reconstruction Fidelity with JumpReLU Sparse Autoencoders, Rajamanoharan
        et al. 2024, arXiv 2407.14435 (thresholds by straight-through gradients).
        Dictionary Learning Optimization Techniques, Conerly et al., Transformer Circuits, January 2025
        (tanh penalty, straight-through gradients to the inputs as well, equal firing rates at the start).
    """

    exact: ClassVar[dict[str, torch.dtype]] = {"threshold": torch.float32}

    def __init__(
        self,
        d_model: int,
        n_latents: int,
        target_l0: int | float | None = None,
        sparsity_coefficient: int | float | None = None,
        penalty: Literal["step", "tanh", "quadratic"] = "step",
        bandwidth: float = 0.5,
    ) -> None:
        """Describes the kind.

        Args:
            d_model: width of the rows.
            n_latents: size of the dictionary.
            target_l0: latents that are to fire per row; or
            sparsity_coefficient: weight of the penalty, on rows of mean squared norm d_model. "quadratic"
                needs the target, and may have both (the weight is 1 where it is not given).
            penalty: what is kept small.
            bandwidth: width of the ramp that stands for the step, in the units of rows of mean squared norm
                d_model.

        Raises:
            InputError: for an argument out of range.
        """
        if penalty not in ("step", "tanh", "quadratic"):
            raise InputError(f"`penalty` must be step, tanh or quadratic, got {penalty!r}.")
        if not 0 < bandwidth < float("inf"):
            raise InputError(f"`bandwidth` must be positive and finite, got {bandwidth}.")
        if penalty == "quadratic":
            if target_l0 is None:
                raise InputError("`target_l0` must be given with `penalty`: quadratic.")
            super().__init__(d_model, n_latents, target_l0, None)
            weight = 1.0 if sparsity_coefficient is None else sparsity_coefficient
            self.sparsity_coefficient = check_coefficient(weight)
        else:
            super().__init__(d_model, n_latents, target_l0, sparsity_coefficient)
        self.penalises, self.bandwidth = penalty, bandwidth
        self.threshold = nn.Parameter(torch.full((n_latents,), 0.1))

    @property
    def inference(self) -> str:
        """The rule as saved."""
        return "latents = pre_acts where pre_acts > threshold, else 0"

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return {**super().config, "penalty": self.penalises, "bandwidth": self.bandwidth}

    def training_code(
        self, u: Float[Tensor, "rows d_model"], group: Group = ALONE, turn: Int[Tensor, " some"] | None = None
    ) -> TrainingCode:
        """Those above their thresholds, and those just below, which have a gradient but the value 0."""
        v = self.encoder_input(u)
        near = self.threshold.detach() - self.bandwidth / 2
        forced = self.forced(v, turn, group)
        entries = self.select(v, lambda rows, first: above(rows, near, first), forced)
        step = self._step(entries)
        if forced is not None:
            step = step.masked_fill(forced.among(entries.places(self.n_latents), self.n_latents), 1.0)
        # The step's ramp has the height of the threshold: d latents / d threshold = -threshold / bandwidth.
        height = self.threshold.detach()[entries.indices]
        ramp = step - step.detach()
        values = entries.values * step.detach() + height * ramp
        penalised = step
        if self.penalises == "tanh":
            penalised = (4.0 * entries.values).tanh() * step.detach() + (4.0 * height).tanh() * ramp
        news = self._l0_of(step, len(u))
        return TrainingCode(entries._replace(values=values), v, penalised, news)

    def _step(self, entries: SparseLatents) -> Tensor:
        """1 where an entry is above its threshold, else 0; with the gradient of the ramp."""
        gap = entries.values - self.threshold[entries.indices]
        ramp = (gap.detach().abs() < self.bandwidth / 2).to(gap.dtype) / self.bandwidth
        return (gap.detach() > 0).to(gap.dtype) + ramp * (gap - gap.detach())

    def penalty(self, code: TrainingCode) -> Float[Tensor, ""]:
        """What the class says, mean over rows."""
        assert code.penalised is not None
        l0 = code.penalised.sum() / len(code.inputs)
        if self.penalises != "quadratic" or self.target_l0 is None:
            return l0
        off = self.recent_l0 / self.l0_now - 1
        return off.square() + 2 * off * (l0 - l0.detach()) / self.l0_now

    def _raise_thresholds(self, by: Float[Tensor, ""]) -> None:
        self.threshold.add_(by.expm1() * self.threshold.clamp_min(1e-2))  # also from zero

    def encode_normalised(self, u: Float[Tensor, "rows d_model"]) -> SparseLatents:
        """What lies above the thresholds."""
        return self.select(self.encoder_input(u), lambda rows, _: above(rows, self.threshold.detach()))

    def dead_pre_acts(self, code: TrainingCode, dead: Int[Tensor, " dead"]) -> Float[Tensor, "rows dead"]:
        """Their pre-activations less their thresholds."""
        return super().dead_pre_acts(code, dead) - self.threshold[dead]

    @torch.no_grad()
    def resize_latents(self, factor: Float[Tensor, ""]) -> None:
        """And their thresholds."""
        super().resize_latents(factor)
        self.threshold.mul_(factor)

    @torch.no_grad()
    def set_latents(self, ids: Int[Tensor, " some"], directions: Float[Tensor, "some d_model"]) -> None:
        """As all do, with the median threshold."""
        super().set_latents(ids, directions)
        self.threshold[ids] = self.threshold.median()

    @torch.no_grad()
    def constrain(self) -> None:
        """Also keeps thresholds from falling below zero."""
        super().constrain()
        self.threshold.clamp_min_(0.0)

    def _fire_above(self, levels: Float[Tensor, " n_latents"]) -> None:
        self.threshold.copy_(levels.clamp_min(0.0))

    def _own_tensors(self) -> dict[str, Tensor]:
        return {**super()._own_tensors(), "threshold": self.threshold.double() / self.input_scale.double()}

    def _take_own(self, tensors: Mapping[str, Tensor], norms: Tensor) -> None:
        super()._take_own(tensors, norms)
        self.threshold.copy_(tensors["threshold"].double() * norms * self.input_scale.double())

    def _saved_dtype(self, name: str) -> torch.dtype:
        return self.threshold.dtype if name == "threshold" else super()._saved_dtype(name)
