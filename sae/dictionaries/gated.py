"""Gated: one encoder says which latents fire, the same with other scale and bias how strongly."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from sae.dictionaries.autoencoder import TrainingCode
from sae.dictionaries.penalised import Penalised
from sae.ops.group import ALONE, Group
from sae.ops.mean_square import mean_square
from sae.ops.selection import above
from sae.ops.sparse import SparseLatents, sparse_decode


class Gated(Penalised):
    """latents = relu(exp(r_mag) * (v @ W_enc) + b_mag) where v @ W_enc + b_enc > 0, else 0.

    penalty = sum of relu(gate), gate = v @ W_enc + b_enc: it shrinks the gate and leaves the latents their
    size. As the step of the gate has no gradient, the gate also has to reconstruct by itself, through a
    decoder that takes no gradient from it: |u - relu(gate) @ W_dec - b_dec|^2 is added to the loss.

    References:
        Improving Dictionary Learning with Gated Sparse Autoencoders, Rajamanoharan et al. 2024,
        arXiv 2404.16014.
    """

    default_revival: ClassVar[tuple[str, ...]] = ("resample",)  # AuxK has no gradient below zero

    def __init__(
        self,
        d_model: int,
        n_latents: int,
        target_l0: int | float | None = None,
        sparsity_coefficient: int | float | None = None,
    ) -> None:
        """Describes the kind; the arguments are those of `ReLU`."""
        super().__init__(d_model, n_latents, target_l0, sparsity_coefficient)
        self.r_mag = nn.Parameter(torch.zeros(n_latents))
        self.b_mag = nn.Parameter(torch.zeros(n_latents))

    @property
    def inference(self) -> str:
        """The rule as saved."""
        return "latents = relu(exp(r_mag) * (pre_acts - b_enc) + b_mag) where pre_acts > 0, else 0"

    def training_code(
        self, u: Float[Tensor, "rows d_model"], group: Group = ALONE, turn: Int[Tensor, " some"] | None = None
    ) -> TrainingCode:
        """Those whose gate is open; a latent whose turn it is gets its gate opened where it is strongest."""
        v = self.encoder_input(u)
        zero = torch.zeros((), device=u.device)
        forced = self.forced(v, turn, group, biased=False)
        gates = self.select(v, lambda rows, first: above(rows, zero, first), forced)
        latents = gates._replace(values=self._magnitudes(gates))
        news = self._l0_of(latents.values > 0, len(u))
        return TrainingCode(latents, v, gates.values.relu(), news)

    def _magnitudes(self, gates: SparseLatents) -> Tensor:
        at = gates.indices
        return (self.r_mag[at].exp() * (gates.values - self.b_enc[at]) + self.b_mag[at]).relu()

    def penalty(self, code: TrainingCode) -> Float[Tensor, ""]:
        """The sum of a row's open gates, mean over rows."""
        assert code.penalised is not None
        return code.penalised.sum() / len(code.inputs)

    def other_losses(self, u: Float[Tensor, "rows d_model"], code: TrainingCode) -> dict[str, Tensor]:
        """What the gate leaves unexplained by itself."""
        assert code.penalised is not None
        gate = code.latents._replace(values=code.penalised)
        residual = u - sparse_decode(gate, self.W_dec.detach()) - self.b_dec.detach()
        return {"gate": mean_square(self.weigh(residual))}

    def encode_normalised(self, u: Float[Tensor, "rows d_model"]) -> SparseLatents:
        """The magnitudes where the gate is open."""
        zero = torch.zeros((), device=u.device)
        gates = self.select(self.encoder_input(u), lambda rows, _: above(rows, zero))
        return gates._replace(values=self._magnitudes(gates))

    @torch.no_grad()
    def resize_latents(self, factor: Float[Tensor, ""]) -> None:
        """Of the magnitudes; gates are open or not."""
        self.r_mag.add_(factor.log())
        self.b_mag.mul_(factor)

    @torch.no_grad()
    def set_latents(self, ids: Int[Tensor, " some"], directions: Float[Tensor, "some d_model"]) -> None:
        """As all do, with magnitudes that are the gate's."""
        super().set_latents(ids, directions)
        self.r_mag[ids] = 0.0
        self.b_mag[ids] = 0.0

    def _fire_above(self, levels: Float[Tensor, " n_latents"]) -> None:
        self.b_enc.copy_(-levels)

    def _own_tensors(self) -> dict[str, Tensor]:
        own = super()._own_tensors()
        scale = self.input_scale.double()
        # exp(r) * (x @ W_enc - mean @ W_enc) + b_mag / scale, and b_enc has mean @ W_enc in it already:
        # of raw pre-activations less raw b_enc nothing of the mean is left, so b_mag takes it up.
        of_mean = self.b_enc.double() / scale - own["b_enc"]
        b_mag = self.b_mag.double() / scale - self.r_mag.double().exp() * of_mean
        return {**own, "r_mag": self.r_mag, "b_mag": b_mag}

    def _take_own(self, tensors: Mapping[str, Tensor], norms: Tensor) -> None:
        super()._take_own(tensors, norms)
        mean, scale = self.input_mean.double(), self.input_scale.double()
        of_mean = norms * (mean @ tensors["W_enc"].double())
        r_mag, b_mag = tensors["r_mag"].double(), tensors["b_mag"].double() * norms
        self.r_mag.copy_(r_mag)
        self.b_mag.copy_((b_mag + r_mag.exp() * of_mean) * scale)
