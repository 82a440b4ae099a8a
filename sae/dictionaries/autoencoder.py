"""What all sparse autoencoders share: a linear encoder, unit-norm directions, input scaling inside."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from sae.dictionaries.base import Dictionary
from sae.dictionaries.initialisation import tied_rows
from sae.errors import InputError
from sae.ops.sparse import SparseLatents, sparse_decode, sparse_pre_acts


class TrainingCode(NamedTuple):
    """The code of a training batch, in normalised units, with gradients."""

    latents: SparseLatents
    """What the decoder gets; gradients reach W_enc and b_enc through its values."""
    pre_acts: Float[Tensor, "rows n_latents"]
    """All pre-activations, without gradients: what else a loss may want to select from."""


class SparseAutoencoder(Dictionary):
    r"""A linear encoder, a selection rule (the kind), and a decoder with unit rows.

    With x in R^d, n latents and the data's mean mu and scale s kept inside,

        u = (x - mu) * s                     normalised input: mean 0, mean squared norm d
        pre_acts = u @ W_enc + b_enc         W_enc (d, n), b_enc (n,)
        latents  = select(pre_acts)          the kind's rule; at least zero
        x_hat    = (latents @ W_dec + b_dec) / s + mu        W_dec (n, d), unit rows

    Why normalise inside: one learning rate serves models whose activations differ by orders of
    magnitude, and nobody can forget to scale (a defect that most public formats share). The saved
    form has mu and s folded in exactly: pre_acts = x @ W_enc + (b_enc / s - mu @ W_enc) on raw x.

    W_enc is held transposed, (n, d), a row per latent: its gradient is then made of whole rows.
    """

    input_mean: Tensor
    input_scale: Tensor

    def __init__(self, d_model: int, n_latents: int) -> None:
        super().__init__(d_model, n_latents)
        rows = tied_rows(n_latents, d_model)
        self.W_enc_rows = nn.Parameter(rows.clone())
        self.W_dec = nn.Parameter(rows)
        self.b_enc = nn.Parameter(torch.zeros(n_latents))
        self.b_dec = nn.Parameter(torch.zeros(d_model))
        self.register_buffer("input_mean", torch.zeros(d_model))
        self.register_buffer("input_scale", torch.ones(()))

    @abstractmethod
    def select(self, pre_acts: Float[Tensor, "rows n_latents"]) -> SparseLatents:
        """The kind's rule: which latents fire, with their pre-activations, not yet rectified."""

    @property
    def W_enc(self) -> Float[Tensor, "d_model n_latents"]:
        """The encoder matrix as written in formulas."""
        return self.W_enc_rows.T

    @property
    def directions(self) -> Float[Tensor, "n_latents d_model"]:
        """W_dec: its rows are kept at norm one."""
        return self.W_dec

    def set_input_statistics(self, mean: Float[Tensor, " d_model"], mean_squared_norm: float) -> None:
        """Centres and scales inputs from now on: after it, u has mean 0 and mean squared norm d_model.

        Args:
            mean: mean of the training rows, raw units.
            mean_squared_norm: mean of |x|^2 over the training rows (about zero, not about the mean).

        Raises:
            InputError: if the rows do not vary.
        """
        variance = mean_squared_norm - float(mean.double().square().sum())
        if not variance > 1e-9 * max(mean_squared_norm, 1e-30):
            raise InputError(
                f"the activations do not vary (total variance {variance:.3g}, mean squared norm"
                f" {mean_squared_norm:.3g}); nothing can be learned from them: check the hookpoint."
            )
        self.input_mean.copy_(mean)
        self.input_scale.fill_((self.d_model / variance) ** 0.5)

    def normalise(self, x: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows d_model"]:
        """u = (x - mean) * scale, in the parameters' dtype."""
        return (x.to(self.input_mean.dtype) - self.input_mean) * self.input_scale

    def training_code(self, u: Float[Tensor, "rows d_model"]) -> TrainingCode:
        """Encodes normalised inputs, with gradients as sparse as the code."""
        with torch.no_grad():
            pre_acts = F.linear(u, self.W_enc_rows, self.b_enc)
        selected = sparse_pre_acts(u, self.W_enc_rows, self.b_enc, self.select(pre_acts))
        return TrainingCode(selected._replace(values=selected.values.relu()), pre_acts)

    def decode_normalised(self, latents: SparseLatents) -> Float[Tensor, "rows d_model"]:
        """The reconstruction of u: latents @ W_dec + b_dec."""
        return sparse_decode(latents, self.W_dec) + self.b_dec

    def encode_sparse(self, x: Float[Tensor, "... d_model"]) -> SparseLatents:
        """The latents that fire, in raw units, one CSR row per vector of x."""
        u = self.normalise(self.rows_of(x))
        latents = self.select(F.linear(u, self.W_enc_rows, self.b_enc))
        return latents._replace(values=latents.values.relu() / self.input_scale).without_zeros()

    def encode(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... n_latents"]:
        """Latents of x, dense, in raw units."""
        return self.encode_sparse(x).to_dense(self.n_latents).reshape(*x.shape[:-1], self.n_latents)

    def decode(self, latents: Float[Tensor, "... n_latents"]) -> Float[Tensor, "... d_model"]:
        """latents @ W_dec + b_dec / scale + mean."""
        return latents @ self.W_dec + self._raw_b_dec()

    def decode_sparse(self, latents: SparseLatents) -> Float[Tensor, "rows d_model"]:
        """The same from a sparse code, touching only the rows it names."""
        return sparse_decode(latents, self.W_dec) + self._raw_b_dec()

    def _raw_b_dec(self) -> Tensor:
        return self.b_dec / self.input_scale + self.input_mean

    @torch.no_grad()
    def remove_parallel_gradient(self) -> None:
        """Takes from each row of W_dec.grad its part along the row, which unit norm would undo."""
        if self.W_dec.grad is not None:
            along = (self.W_dec.grad * self.W_dec).sum(-1, keepdim=True)
            self.W_dec.grad.sub_(along * self.W_dec)

    @torch.no_grad()
    def restore_unit_norm(self) -> None:
        """Divides each row of W_dec by its norm; to be called after every optimiser step."""
        self.W_dec.div_(self.W_dec.norm(dim=-1, keepdim=True).clamp_min(1e-8))

    @torch.no_grad()
    def saved_tensors(self) -> dict[str, Tensor]:
        """W_enc (d, n), b_enc, W_dec (n, d) with unit rows, b_dec: for raw x, nothing left to apply."""
        mean, scale = self.input_mean.double(), self.input_scale.double()
        b_enc = self.b_enc.double() / scale - self.W_enc_rows.double() @ mean
        tensors = {"W_enc": self.W_enc, "b_enc": b_enc, "W_dec": self.W_dec, "b_dec": self._raw_b_dec()}
        return {name: tensor.detach().to(self.W_dec.dtype) for name, tensor in tensors.items()}

    @torch.no_grad()
    def load_saved_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes the folded form: mean 0 and scale 1 from here on."""
        self.W_enc_rows.copy_(tensors["W_enc"].T)
        for name in ("b_enc", "W_dec", "b_dec"):
            getattr(self, name).copy_(tensors[name])
        self.input_mean.zero_()
        self.input_scale.fill_(1.0)
