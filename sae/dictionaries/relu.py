"""ReLU: positive pre-activations fire, and an L1 penalty keeps them few."""

from __future__ import annotations

from typing import ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.dictionaries.autoencoder import TrainingCode
from sae.dictionaries.penalised import Penalised
from sae.ops.group import ALONE, Group
from sae.ops.selection import above
from sae.ops.sparse import SparseLatents


class ReLU(Penalised):
    """latents = relu(pre_acts); penalty = sum of latents times the norms of their directions.

    The norms are one here (see `SparseAutoencoder`), so the penalty is the sum of the latents.

    References:
        Update on how we train SAEs, Conerly et al., Transformer Circuits, April 2024.
        Sparse Autoencoders Find Highly Interpretable Features in Language Models, Cunningham et al.
        2023, arXiv 2309.08600.
    """

    default_revival: ClassVar[tuple[str, ...]] = ("resample",)  # AuxK has no gradient below zero

    def __init__(
        self,
        d_model: int,
        n_latents: int,
        target_l0: int | float | None = None,
        sparsity_coefficient: int | float | None = None,
    ) -> None:
        """Describes the kind.

        Args:
            d_model: width of the rows.
            n_latents: size of the dictionary.
            target_l0: latents that are to fire per row; or
            sparsity_coefficient: weight of the penalty, on rows of mean squared norm d_model.

        Raises:
            InputError: unless exactly one of the two is given, in its range.
        """
        super().__init__(d_model, n_latents, target_l0, sparsity_coefficient)

    @property
    def inference(self) -> str:
        """The rule as saved."""
        return "latents = relu(pre_acts)"

    def training_code(
        self, u: Float[Tensor, "rows d_model"], group: Group = ALONE, turn: Int[Tensor, " some"] | None = None
    ) -> TrainingCode:
        """All positive ones. A latent whose turn it is fires without its bias, where it is strongest."""
        v = self.encoder_input(u)
        zero = torch.zeros((), device=u.device)
        forced = self.forced(v, turn, group, biased=False)
        selected = self.select(v, lambda rows, first: above(rows, zero, first), forced)
        values = selected.values
        if turn is not None:
            values = torch.where(values > 0, values, values - self.b_enc[selected.indices])
        values = values.relu()
        news = self._l0_of(values > 0, len(u))
        return TrainingCode(selected._replace(values=values), v, values, news)

    def penalty(self, code: TrainingCode) -> Float[Tensor, ""]:
        """The sum of a row's latents, mean over rows."""
        assert code.penalised is not None
        return code.penalised.sum() / len(code.inputs)

    def encode_normalised(self, u: Float[Tensor, "rows d_model"]) -> SparseLatents:
        """What is positive."""
        zero = torch.zeros((), device=u.device)
        return self.select(self.encoder_input(u), lambda rows, _: above(rows, zero))

    def _fire_above(self, levels: Float[Tensor, " n_latents"]) -> None:
        self.b_enc.copy_(-levels)
