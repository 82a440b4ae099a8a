"""BatchTopK: the k largest pre-activations a row on average over the batch fire; a threshold in use."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from sae.dictionaries.autoencoder import TrainingCode
from sae.dictionaries.jumprelu import JumpReLU
from sae.dictionaries.linear_encoder import LinearEncoder
from sae.dictionaries.topk import checked_k
from sae.errors import InputError
from sae.ops.group import ALONE, Group
from sae.ops.selection import above, top_of_batch
from sae.ops.sparse import SparseLatents


class BatchTopK(LinearEncoder):
    """In training the k * rows largest pre-activations of the batch fire: some rows get more than others.

    The batch is that of all ranks, and the choice among it exact. In use no vector may depend on its
    neighbours, so a latent fires where its pre-activation is above one threshold: the running mean of
    the smallest one that fired in each batch, corrected for its start at 0. It is kept in float64.

    References:
        BatchTopK Sparse Autoencoders, Bussmann, Leask and Nanda 2024, arXiv 2412.06410.
    """

    default_revival: ClassVar[tuple[str, ...]] = ("minfire", "resample")
    default_l0_start: ClassVar[float] = 3.0
    news: ClassVar[tuple[str, ...]] = ("smallest", "fires")
    exact: ClassVar[dict[str, torch.dtype]] = {"threshold": torch.float64, "weight": torch.float64}
    threshold: Tensor
    """The running mean as it is, normalised units."""
    weight: Tensor
    """What its weights add up to; 1 in the long run."""

    def __init__(
        self, d_model: int, n_latents: int, k: int | float | None = None, threshold_rate: float = 0.01
    ) -> None:
        """Describes the kind.

        Args:
            d_model: width of the rows.
            n_latents: size of the dictionary.
            k: latents per row on average, may be fractional; null where `model.target_l0` says it.
            threshold_rate: share of the newest batch in the threshold's running mean, which starts at 0.

        Raises:
            InputError: for an argument out of range.
        """
        super().__init__(d_model, n_latents)
        if not 0 < threshold_rate <= 1:
            raise InputError(f"`threshold_rate` must be in (0, 1], got {threshold_rate}.")
        self.k, self.threshold_rate = checked_k(k, n_latents), threshold_rate
        self.register_buffer("threshold", torch.zeros((), dtype=torch.float64))
        self.register_buffer("weight", torch.zeros((), dtype=torch.float64))

    @property
    def inference(self) -> str:
        """The rule as saved."""
        return "latents = pre_acts where pre_acts > threshold, else 0"

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return self.arguments(k=self.k, threshold_rate=self.threshold_rate)

    @property
    def entries_per_row(self) -> float:
        """Latents that training selects per row, on average."""
        return float(self.k)

    def training_code(
        self, u: Float[Tensor, "rows d_model"], group: Group = ALONE, turn: Int[Tensor, " some"] | None = None
    ) -> TrainingCode:
        """The largest of the batch; latents whose turn it is fire once each within the same budget."""
        v = self.encoder_input(u)
        count = int(self.k * self.l0_factor * (len(u) * group.world))
        selected, forced = top_of_batch(self.blocks(v), count, group, turn)
        ordinary = selected.values
        if forced is not None:
            ordinary = ordinary.masked_fill(
                forced.among(selected.places(self.n_latents), self.n_latents), 0.0
            )
        news = _smallest(ordinary, group)
        selected = self.with_gradients(v, selected)
        return TrainingCode(selected._replace(values=selected.values.relu()), v, news=news)

    def dead_pre_acts(self, code: TrainingCode, dead: Int[Tensor, " dead"]) -> Float[Tensor, "rows dead"]:
        """Their pre-activations less the threshold."""
        return super().dead_pre_acts(code, dead) - self.fires_above.to(code.inputs.dtype)

    @torch.no_grad()
    def resize_latents(self, factor: Float[Tensor, ""]) -> None:
        """And the threshold."""
        super().resize_latents(factor)
        self.threshold.mul_(factor)

    def hear(self, news: Mapping[str, Tensor]) -> None:
        """Moves the threshold towards the smallest value that fired; stays where nothing did.

        As long as training is still coming down to k, only the newest batch counts.
        """
        fires = news["fires"].double()
        if self.l0_factor > 1:
            self.threshold.mul_(~(fires > 0))
            self.weight.mul_(~(fires > 0))
        smallest = news["smallest"].double() / fires
        rate = self.threshold_rate * (fires > 0).double()
        self.threshold.add_(rate * (smallest.nan_to_num() - self.threshold).to(self.threshold.dtype))
        self.weight.add_(rate * (1.0 - self.weight))

    @property
    def fires_above(self) -> Float64[Tensor, ""]:
        """The threshold in use, normalised units: the running mean over its weights' sum."""
        return self.threshold / torch.where(self.weight > 0, self.weight, 1.0)

    def encode_normalised(self, u: Float[Tensor, "rows d_model"]) -> SparseLatents:
        """What lies above the threshold."""
        return self.select(self.encoder_input(u), lambda rows, _: above(rows, self.fires_above))

    @torch.no_grad()
    def as_jumprelu(self) -> JumpReLU:
        """The same dictionary in use, as a JumpReLU whose thresholds are all equal."""
        with torch.device(self.device):
            twin = JumpReLU(self.d_model, self.n_latents, target_l0=float(self.k)).to(self.W_dec.dtype)
        tensors = self.saved_tensors()
        twin.load_saved_tensors({**tensors, "threshold": tensors["threshold"].expand(self.n_latents)})
        return twin

    def _own_tensors(self) -> dict[str, Tensor]:
        return {**super()._own_tensors(), "threshold": self.fires_above / self.input_scale.double()}

    def _take_own(self, tensors: Mapping[str, Tensor], norms: Tensor) -> None:
        if norms.max() > 1.001 * norms.min():
            raise InputError(
                f"`W_dec` must have rows of one norm, got {norms.min():.4g} to {norms.max():.4g}: one"
                " threshold cannot stand for all; take them as a JumpReLU."
            )
        super()._take_own(tensors, norms)
        self.threshold.copy_(tensors["threshold"].double() * norms.mean() * self.input_scale.double())
        self.weight.fill_(1.0)

    def _saved_dtype(self, name: str) -> torch.dtype:
        return torch.float64 if name == "threshold" else super()._saved_dtype(name)


def _smallest(values: Tensor, group: Group) -> dict[str, Tensor]:
    """The smallest positive value on any rank, and whether there is one."""
    least = (
        -torch.where(values > 0, values, torch.inf).amin() if len(values) else values.new_tensor(-torch.inf)
    )
    group.max_(least)
    fires = least.isfinite()
    return {"smallest": torch.where(fires, -least, 0.0), "fires": fires.to(least.dtype)}
