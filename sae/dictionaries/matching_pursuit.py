"""MatchingPursuit: no encoder; each row takes the direction it fits best, then again what is left of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.dictionaries.autoencoder import SparseAutoencoder, TrainingCode
from sae.dictionaries.topk import whole_k
from sae.errors import InputError
from sae.ops.encoder import PreActs
from sae.ops.group import ALONE, Group
from sae.ops.matching_pursuit import matching_pursuit
from sae.ops.selection import strongest_rows, top_k
from sae.ops.sparse import SparseLatents


class MatchingPursuit(SparseAutoencoder):
    """latents = k rounds of matching pursuit of x - b_dec on W_dec's rows, with positive coefficients.

    The code is found without gradients and held fixed while W_dec learns, as in dictionary learning
    before autoencoders: the decoder then follows the code's residual. Published MP-SAEs differentiate
    through the rounds. It needs k products where others need one, and explains more variance with
    directions that are further from the truth (see the README's board).

    References:
        Matching pursuits with time-frequency dictionaries, Mallat and Zhang 1993.
        From Flat to Hierarchical: Extracting Sparse Representations with Matching Pursuit, Costa et al.
        2025, arXiv 2506.03093.
    """

    def __init__(
        self, d_model: int, n_latents: int, k: int | None = None, residual_threshold: float = 0.0
    ) -> None:
        """Describes the kind.

        Args:
            d_model: width of the rows.
            n_latents: size of the dictionary.
            k: rounds, and so the most latents of a row.
            residual_threshold: a row ends early when its residual is this share of its own length.

        Raises:
            InputError: for an argument out of range.
        """
        super().__init__(d_model, n_latents)
        if not 0 <= residual_threshold < 1:
            raise InputError(f"`residual_threshold` must be in [0, 1), got {residual_threshold}.")
        self.k, self.residual_threshold = whole_k(k, n_latents), residual_threshold

    @property
    def inference(self) -> str:
        """The rule as saved."""
        stop = f", until |r| <= {self.residual_threshold} |x - b_dec|" if self.residual_threshold else ""
        return (
            f"r = x - b_dec; {self.k} times{stop}: i = argmax(r @ W_dec.T), z = max(0, r @ W_dec[i]),"
            " latents[i] += z, r -= z * W_dec[i]"
        )

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments."""
        return self.arguments(k=self.k, residual_threshold=self.residual_threshold)

    @property
    def entries_per_row(self) -> float:
        """Latents of a row, at most: k."""
        return float(self.k)

    @torch.no_grad()
    def training_code(
        self, u: Float[Tensor, "rows d_model"], group: Group = ALONE, turn: Int[Tensor, " some"] | None = None
    ) -> TrainingCode:
        """The pursuit's code; a latent whose turn it is comes first in the row that fits it best."""
        first = None
        if turn is not None:
            no_bias = self.W_dec.new_zeros(len(turn))
            forced = strongest_rows(PreActs(u - self.b_dec, self.W_dec[turn], no_bias), turn, group)
            first = torch.full((len(u),), -1, dtype=torch.int64, device=u.device)
            first[forced.rows] = forced.latents
        k = min(self.n_latents, max(1, round(self.k * self.l0_factor)))
        return TrainingCode(self._pursue(u, k, first), u)

    def revived_code(
        self, code: TrainingCode, residual: Float[Tensor, "rows d_model"], dead: Int[Tensor, " dead"], k: int
    ) -> SparseLatents:
        """The one dead latent that fits a row's residual best: more would explain the same part again."""
        with torch.no_grad():
            best = top_k(residual @ self.W_dec[dead].T, 1)
        return best._replace(values=best.values.relu(), indices=dead[best.indices])

    def dead_pre_acts(self, code: TrainingCode, dead: Int[Tensor, " dead"]) -> Float[Tensor, "rows dead"]:
        """Their products with a row, less the product of the direction that the row takes first."""
        centred = code.inputs - self.b_dec.detach()
        with torch.no_grad():
            needed = (centred @ self.W_dec.T).amax(1, keepdim=True)
        return centred @ self.W_dec[dead].T - needed

    @torch.no_grad()
    def set_latents(self, ids: Int[Tensor, " some"], directions: Float[Tensor, "some d_model"]) -> None:
        """Their rows of W_dec."""
        self.W_dec[ids] = directions

    @torch.no_grad()
    def encode_normalised(self, u: Float[Tensor, "rows d_model"]) -> SparseLatents:
        """The same code as in training."""
        return self._pursue(u, self.k)

    def _pursue(self, u: Tensor, k: int, first: Tensor | None = None) -> SparseLatents:
        return matching_pursuit(u - self.b_dec, self.W_dec, k, self.residual_threshold, first=first)

    def _take_own(self, tensors: Mapping[str, Tensor], norms: Tensor) -> None:
        """Nothing: directions are all there is, and the pursuit takes them at norm one."""
