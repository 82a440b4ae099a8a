"""Autoencoders whose encoder is one matrix: what all kinds but the pursuits share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from sae.dictionaries.autoencoder import SparseAutoencoder, TrainingCode
from sae.ops.encoder import PreActs
from sae.ops.group import Group
from sae.ops.selection import Forced, block_by_block, strongest_rows, top_k
from sae.ops.sparse import SparseLatents, sparse_pre_acts


class LinearEncoder(SparseAutoencoder):
    """pre_acts = v @ W_enc + b_enc, W_enc (d, n), where v is u or, on request, u whitened.

    W_enc is held transposed, (n, d), a row per latent: its gradient is then made of whole rows. It
    starts as the decoder's transpose.

    Whitened (`set_whitening`), the encoder sees v = u C^-1/2 and the loss measures the residual times
    C^-1/2, C being the covariance of u: directions of small variance count as much as those of large.
    The decoder stays in units of u with unit rows, so the saved form is exact: W_enc <- C^-1/2 W_enc.

    References:
        Data Whitening Improves Sparse Autoencoder Learning, Saraswatula and Klindt 2025, arXiv 2511.13981
        (there the decoder lives in whitened space, and folding changes the norms that top-k compares).
    """

    whitening: Tensor | None

    def __init__(self, d_model: int, n_latents: int) -> None:
        super().__init__(d_model, n_latents)
        self.W_enc_rows = nn.Parameter(self.W_dec.detach().clone())
        self.b_enc = nn.Parameter(torch.zeros(n_latents))
        self.register_buffer("whitening", None)

    @property
    def W_enc(self) -> Float[Tensor, "d_model n_latents"]:
        """The encoder matrix as written in formulas."""
        return self.W_enc_rows.T

    @torch.no_grad()
    def set_whitening(self, covariance: Float[Tensor, "d_model d_model"]) -> None:
        """Whitens by the covariance of raw x; variances below a thousandth of their mean count as that."""
        of_u = covariance.double() * self.input_scale.double() ** 2
        variances, axes = torch.linalg.eigh(of_u.cpu())
        variances = variances.clamp_min(1e-3 * variances.mean())
        self.whitening = whitening = (axes / variances.sqrt() @ axes.T).to(self.W_dec)
        self.W_enc_rows.copy_(F.normalize(self.W_dec @ whitening, dim=1))

    @torch.no_grad()
    def resize_latents(self, factor: Float[Tensor, ""]) -> None:
        """Multiplies all latents by a positive factor: the same ones fire."""
        self.W_enc_rows.mul_(factor)
        self.b_enc.mul_(factor)

    def encoder_input(self, u: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows d_model"]:
        """v: what W_enc multiplies."""
        return u if self.whitening is None else u @ self.whitening

    def weigh(self, residual: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows d_model"]:
        """The residual as the loss measures it."""
        return self.encoder_input(residual)

    def pre_acts(
        self, v: Float[Tensor, "rows d_model"], of: Int[Tensor, " some"] | slice = slice(None)
    ) -> Float[Tensor, "rows some"]:
        """v @ W_enc + b_enc of some latents, or all; with gradients, and memory for every number."""
        return F.linear(v, self.W_enc_rows[of], self.b_enc[of])

    def select(
        self,
        v: Float[Tensor, "rows d_model"],
        choose: Callable[[Tensor, tuple[Tensor, Tensor] | None], SparseLatents],
        forced: Forced | None = None,
    ) -> SparseLatents:
        """What `choose` takes of every block of pre-activations, with gradients to W_enc, b_enc and v."""
        return self.with_gradients(v, block_by_block(self.blocks(v), choose, forced))

    def blocks(
        self, v: Float[Tensor, "rows d_model"], of: Int[Tensor, " some"] | slice = slice(None)
    ) -> PreActs:
        """Pre-activations of some latents, or all; of some rows after those of others, without gradients."""
        return PreActs(v, self.W_enc_rows[of], self.b_enc[of])

    def forced(
        self,
        v: Float[Tensor, "rows d_model"],
        turn: Int[Tensor, " some"] | None,
        group: Group,
        biased: bool = True,
    ) -> Forced | None:
        """Each latent whose turn it is, in the row of all ranks' where it is strongest and above zero.

        Args:
            v: the encoder's input.
            turn: the latents; None = nobody's.
            group: ranks that share the batch.
            biased: whether b_enc counts.
        """
        if turn is None:
            return None
        bias = self.b_enc[turn]
        pre_acts = PreActs(v, self.W_enc_rows[turn], bias if biased else torch.zeros_like(bias))
        return strongest_rows(pre_acts, turn, group)

    def with_gradients(self, v: Tensor, selected: SparseLatents) -> SparseLatents:
        """Selected pre-activations with their gradients to W_enc, b_enc and v."""
        return sparse_pre_acts(v, self.W_enc_rows, self.b_enc, selected)

    def revived_code(
        self, code: TrainingCode, residual: Float[Tensor, "rows d_model"], dead: Int[Tensor, " dead"], k: int
    ) -> SparseLatents:
        """The k largest pre-activations among the dead, rectified."""
        strongest = block_by_block(self.blocks(code.inputs, dead), lambda rows, _: top_k(rows, k))
        strongest = self.with_gradients(code.inputs, strongest._replace(indices=dead[strongest.indices]))
        return strongest._replace(values=strongest.values.relu())

    def dead_pre_acts(self, code: TrainingCode, dead: Int[Tensor, " dead"]) -> Float[Tensor, "rows dead"]:
        """Their pre-activations."""
        return self.pre_acts(code.inputs, dead)

    @torch.no_grad()
    def set_latents(self, ids: Int[Tensor, " some"], directions: Float[Tensor, "some d_model"]) -> None:
        """Decoder and encoder rows along the directions, the encoder's as long as others are, no bias."""
        towards = directions if self.whitening is None else F.normalize(directions @ self.whitening, dim=1)
        self.W_dec[ids] = directions
        self.W_enc_rows[ids] = towards * self.W_enc_rows.norm(dim=1).median()
        self.b_enc[ids] = 0.0

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        if self.whitening is None and (there := state_dict.get(prefix + "whitening")) is not None:
            self.whitening = torch.empty_like(there, device=self.W_dec.device)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _own_tensors(self) -> dict[str, Tensor]:
        rows = self.W_enc_rows.double()
        if self.whitening is not None:
            rows = rows @ self.whitening.double()
        mean, scale = self.input_mean.double(), self.input_scale.double()
        return {"W_enc": rows.T, "b_enc": self.b_enc.double() / scale - rows @ mean}

    def _take_own(self, tensors: Mapping[str, Tensor], norms: Tensor) -> None:
        rows = tensors["W_enc"].double().T * norms[:, None]
        bias = tensors["b_enc"].double() * norms + rows @ self.input_mean.double()
        self.b_enc.copy_(bias * self.input_scale.double())
        if self.whitening is not None:
            rows = torch.linalg.solve(self.whitening.double(), rows.T).T
        self.W_enc_rows.copy_(rows)
