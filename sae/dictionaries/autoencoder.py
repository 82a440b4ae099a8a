"""What all sparse autoencoders share: unit-norm directions, and input scaling inside."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sae.dictionaries.base import Dictionary
from sae.dictionaries.initialisation import tied_rows
from sae.errors import InputError
from sae.ops.group import ALONE, Group
from sae.ops.mean_square import mean_square
from sae.ops.sparse import SparseLatents, sparse_decode

_SOME = 2048
"""Rows of a weight that are worked on at a time, so that what lies between stays in a cache."""


class TrainingCode(NamedTuple):
    """The code of a training batch, in normalised units, with gradients."""

    latents: SparseLatents
    """What the decoder gets; gradients reach the encoder through its values. Zeros do not fire."""
    inputs: Float[Tensor, "rows d_model"]
    """What the encoder was given: u, or u whitened."""
    penalised: Float[Tensor, " entries"] | None = None
    """What the kind's sparsity penalty is taken of, with gradients; None for a kind without one."""
    news: dict[str, Tensor] = {}
    """What the kind wants to know of all ranks after the step: a number for each of its `news`."""


class Reconstruction(NamedTuple):
    """What the decoder makes of a training batch."""

    residual: Float[Tensor, "rows d_model"]
    """u - u_hat, of all latents."""
    loss: Float[Tensor, ""]
    """The kind's reconstruction loss; mean over rows, so that the ranks' losses average to that of one."""
    energy: Float[Tensor, ""]
    """Mean square of the residual as the loss measures it, without gradients."""


class SparseAutoencoder(Dictionary):
    r"""An encoder (the kind's), and a decoder with unit rows, on inputs that are normalised inside.

    With x in R^d, n latents and the data's mean mu and scale s kept inside,

        u = (x - mu) * s                     normalised input: mean 0, mean squared norm d
        latents = the kind's code of u       at least zero
        x_hat   = (latents @ W_dec + b_dec) / s + mu        W_dec (n, d), unit rows

    Why normalise inside: one learning rate serves models whose activations differ by orders of
    magnitude, and nobody can forget to scale (a defect that most public formats share). The saved
    form has mu and s folded in exactly, thresholds too.

    Why unit rows: a latent and its direction may trade a factor without changing x_hat. Public recipes
    leave the factor free and multiply penalties by the row's norm; with the norm held at one that is the
    same penalty, and latents are in units of the residual stream from the first step.
    """

    news: ClassVar[tuple[str, ...]] = ()
    """Names of the numbers that a training code carries for `hear`."""
    default_l0_start: ClassVar[float] = 1.0
    """How many times its final L0 training of this kind best begins with."""
    l0_factor: float = 1.0
    """How many times its final L0 training has now; set before every step (see `Recipe.l0_factor`)."""
    default_revival: ClassVar[tuple[str, ...]] = ("auxk",)
    """How dead latents of this kind are best brought back (see `sae.training.revival`)."""
    input_mean: Tensor
    input_scale: Tensor

    def __init__(self, d_model: int, n_latents: int) -> None:
        super().__init__(d_model, n_latents)
        self.W_dec = nn.Parameter(tied_rows(n_latents, d_model))
        self.b_dec = nn.Parameter(torch.zeros(d_model))
        self.register_buffer("input_mean", torch.zeros(d_model))
        self.register_buffer("input_scale", torch.ones(()))

    # --- training

    @property
    @abstractmethod
    def entries_per_row(self) -> float:
        """Latents that training selects per row, on average."""

    @abstractmethod
    def training_code(
        self, u: Float[Tensor, "rows d_model"], group: Group = ALONE, turn: Int[Tensor, " some"] | None = None
    ) -> TrainingCode:
        """Encodes normalised inputs, with gradients as sparse as the code.

        Args:
            u: normalised inputs, this rank's.
            group: ranks that share the batch.
            turn: latents that are to fire once in the batch of all ranks, where they are positive at all
                (MinFire, see `sae.training.revival`).
        """

    @abstractmethod
    def revived_code(
        self, code: TrainingCode, residual: Float[Tensor, "rows d_model"], dead: Int[Tensor, " dead"], k: int
    ) -> SparseLatents:
        """The code of at most k dead latents a row that is to explain the residual, with gradients (AuxK)."""

    @abstractmethod
    def dead_pre_acts(self, code: TrainingCode, dead: Int[Tensor, " dead"]) -> Float[Tensor, "rows dead"]:
        """How far dead latents are above what they need to fire (negative: below), with gradients."""

    @abstractmethod
    def set_latents(self, ids: Int[Tensor, " some"], directions: Float[Tensor, "some d_model"]) -> None:
        """Begins some latents anew, each with a unit direction that it should fire on."""

    @property
    def begins_with_rows(self) -> bool:
        """Whether `begin` is to be called."""
        return False

    def begin(self, u: Float[Tensor, "rows d_model"]) -> None:
        """Takes what the kind wants to know of the data before the first step; by default nothing."""

    def reconstruct(self, u: Float[Tensor, "rows d_model"], code: TrainingCode) -> Reconstruction:
        """u less the decoder's u_hat; the loss is the mean square of that, of u the part unexplained."""
        residual = u - self.decode_normalised(code.latents)
        loss = mean_square(self.weigh(residual))
        return Reconstruction(residual, loss, loss.detach())

    def other_losses(self, u: Float[Tensor, "rows d_model"], code: TrainingCode) -> dict[str, Tensor]:
        """Terms of the loss that the kind adds, by name; means over rows."""
        return {}

    def hear(self, news: Mapping[str, Tensor]) -> None:
        """Takes what `TrainingCode.news` carried, averaged over all ranks; once a step.

        NaN, where something was not finite on any rank, is to change nothing.
        """

    # --- scaling

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

    def weigh(self, residual: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows d_model"]:
        """The residual as the loss measures it."""
        return residual

    # --- use

    def decode_normalised(self, latents: SparseLatents) -> Float[Tensor, "rows d_model"]:
        """The reconstruction of u: latents @ W_dec + b_dec."""
        return sparse_decode(latents, self.W_dec) + self.b_dec

    @abstractmethod
    def encode_normalised(self, u: Float[Tensor, "rows d_model"]) -> SparseLatents:
        """The code of normalised inputs, for use; zeros allowed."""

    @property
    def directions(self) -> Float[Tensor, "n_latents d_model"]:
        """W_dec: its rows are kept at norm one."""
        return self.W_dec

    def encode_sparse(self, x: Float[Tensor, "... d_model"]) -> SparseLatents:
        """The latents that fire, in raw units, one CSR row per vector of x."""
        latents = self.encode_normalised(self.normalise(self.rows_of(x)))
        return latents._replace(values=latents.values / self.input_scale).without_zeros()

    def encode(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... n_latents"]:
        """Latents of x, dense, in raw units."""
        return self.encode_sparse(x).to_dense(self.n_latents).reshape(*x.shape[:-1], self.n_latents)

    def decode(self, latents: Float[Tensor, "... n_latents"]) -> Float[Tensor, "... d_model"]:
        """latents @ W_dec + b_dec / scale + mean."""
        return latents @ self.W_dec + self._raw_b_dec()

    def _decode_sparse(self, latents: SparseLatents) -> Float[Tensor, "rows d_model"]:
        """The same from a sparse code, touching only the rows it names."""
        return sparse_decode(latents, self.W_dec) + self._raw_b_dec()

    def _raw_b_dec(self) -> Tensor:
        return self.b_dec / self.input_scale + self.input_mean

    # --- constraints

    @torch.no_grad()
    def remove_parallel_gradient(self) -> Float[Tensor, ""]:
        """Takes from each row of W_dec.grad its part along the row, which unit norm would undo.

        Returns:
            The sum of these parts: the derivative of the loss by the log of a factor common to all latents.
        """
        taken = self.W_dec.new_zeros(())
        if self.W_dec.grad is not None:
            # Some rows at a time: what lies between stays in a processor's cache.
            for gradient, rows in zip(self.W_dec.grad.split(_SOME), self.W_dec.split(_SOME), strict=True):
                along = torch.linalg.vecdot(gradient, rows)
                gradient.addcmul_(along[:, None], rows, value=-1)
                taken += along.sum()
        return taken

    @torch.no_grad()
    def constrain(self) -> None:
        """Divides each row of W_dec by its norm; to be called after every optimiser step.

        Rows that do not learn stay as they are: a division by a norm of one to rounding would move them.
        """
        for rows in self.W_dec.split(_SOME) if self.W_dec.requires_grad else ():
            norms = torch.linalg.vector_norm(rows, dim=-1, keepdim=True, dtype=torch.float64)
            rows.div_(norms.clamp_min(1e-8).to(rows.dtype))

    # --- saved form

    @torch.no_grad()
    def saved_tensors(self) -> dict[str, Tensor]:
        """W_dec (n, d) with unit rows, b_dec, and the kind's own: for raw x, nothing left to apply."""
        tensors = {**self._own_tensors(), "W_dec": self.W_dec, "b_dec": self._raw_b_dec()}
        return {name: tensor.detach().to(self._saved_dtype(name)) for name, tensor in tensors.items()}

    @torch.no_grad()
    def load_saved_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes the folded form: mean 0 and scale 1 from here on."""
        self.input_mean.zero_()
        self.input_scale.fill_(1.0)
        self.take(tensors)

    @torch.no_grad()
    def take(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes weights in the saved form, and goes on in this dictionary's own normalised units.

        Rows of W_dec that are not of norm one are brought there, and what depends on their norms with
        them: latents, thresholds and biases are multiplied by it, which leaves x_hat as it was. Rows that
        are of norm one to rounding stay as they are, bit for bit.
        """
        norms = tensors["W_dec"].double().norm(dim=1).clamp_min(1e-8)
        rounding = max(torch.finfo(tensors["W_dec"].dtype).eps, 1e-6)
        norms = torch.where((norms - 1).abs() < rounding, 1.0, norms)
        mean, scale = self.input_mean.double(), self.input_scale.double()
        self.W_dec.copy_(tensors["W_dec"].double() / norms[:, None])
        self.b_dec.copy_((tensors["b_dec"].double() - mean) * scale)
        self._take_own(tensors, norms)

    def _own_tensors(self) -> dict[str, Tensor]:
        """The kind's tensors in the saved form."""
        return {}

    def _take_own(self, tensors: Mapping[str, Tensor], norms: Tensor) -> None:
        """The inverse of `_own_tensors`; `norms` are those that the rows of W_dec had, float64."""

    def _saved_dtype(self, name: str) -> torch.dtype:
        return self.W_dec.dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseAutoencoder:
        """Moves and converts, but keeps `exact` tensors at least as precise as they say."""
        exact = {name: getattr(self, name).detach().clone() for name in self.exact}
        super()._apply(fn, recurse)
        for name, value in exact.items():
            now = getattr(self, name)
            if now.dtype.itemsize < self.exact[name].itemsize and now.device.type != "meta":
                now.data = value.to(now.device, self.exact[name])
        return self

    def exact_are_finite(self) -> Bool[Tensor, ""]:
        """Whether thresholds and their like are numbers: comparisons with one that is not are silent."""
        found = [getattr(self, name).detach().isfinite().all() for name in self.exact]
        return torch.stack([torch.ones((), dtype=torch.bool, device=self.device), *found]).all()

    exact: ClassVar[dict[str, torch.dtype]] = {}
    """Parameters and buffers, with the least precision they keep whatever the dictionary is converted to."""

    def arguments(self, **own: Any) -> dict[str, Any]:
        """`config` of a kind: the widths, and its own arguments."""
        return {"d_model": self.d_model, "n_latents": self.n_latents, **own}
