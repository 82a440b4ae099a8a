"""Refined: the directions of any dictionary, with a code found for every row by pursuit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from sae.dictionaries.base import Dictionary
from sae.dictionaries.initialisation import tied_rows
from sae.errors import InputError
from sae.ops.fista import fista, fista_penalty_for_l0
from sae.ops.gradient_pursuit import gradient_pursuit
from sae.ops.matching_pursuit import matching_pursuit
from sae.ops.pursuit import nonnegative_pursuit
from sae.ops.slots import check_k
from sae.ops.sparse import SparseLatents, sparse_decode

_PURSUITS = {
    "matching_pursuit": matching_pursuit,
    "omp": nonnegative_pursuit,
    "gradient_pursuit": gradient_pursuit,
}
METHODS = (*_PURSUITS, "fista")


class Refined(Dictionary):
    """x_hat = latents @ W_dec + b_dec, where latents >= 0 is a sparse fit to x - b_dec, row by row.

    A linear encoder followed by a selection scores each latent on its own, and misses most where the
    directions of active latents overlap. Refining the code costs compute, not training, and leaves the
    directions alone: it tells a bad encoder from bad directions. A kind whose codes have both signs (PCA)
    keeps only their positive halves.

    `method` is one of

        matching_pursuit    at most k latents a row, one coefficient at a time: the cheapest
        omp                 at most k latents a row, refitted together after every choice
        gradient_pursuit    the same with a gradient step for the refit: for very wide dictionaries
        fista               the lasso at `penalty` (in units of x), then least squares on the latents found;
                            k is the mean over rows that `set_penalty` aims at, not a bound

    Codes carry no gradients.

    References:
        Compute Optimal Inference and Provable Amortisation Gap in Sparse Autoencoders, O'Neill, Gumran and
        Klindt 2024, arXiv 2411.13117. The methods' own are named where they are written, in `sae.ops`.

    Example:
        >>> import torch, sae
        >>> dictionary = sae.Refined.of(sae.TopK(d_model=8, n_latents=32, k=4), "gradient_pursuit")
        >>> dictionary(torch.randn(5, 8)).x_hat.shape
        torch.Size([5, 8])
    """

    W_dec: Tensor
    b_dec: Tensor

    def __init__(
        self, d_model: int, n_latents: int, k: int, method: str = "omp", penalty: float | None = None
    ) -> None:
        super().__init__(d_model, n_latents)
        check_k(k, n_latents)
        if method not in METHODS:
            raise InputError(f"`method` must be one of {', '.join(METHODS)}, got method={method!r}.")
        if penalty is not None and (method != "fista" or not 0 < penalty < float("inf")):
            raise InputError(
                f"`penalty` must be above 0 and finite, and with method='fista', got penalty={penalty:g} with"
                f" method={method!r}; leave it out."
            )
        self.k = k
        self.method = method
        self.penalty = penalty
        self.register_buffer("W_dec", tied_rows(n_latents, d_model))
        self.register_buffer("b_dec", torch.zeros(d_model))

    @classmethod
    @torch.no_grad()
    def of(
        cls, dictionary: Dictionary, method: str = "omp", k: int | None = None, penalty: float | None = None
    ) -> Refined:
        """A copy of a dictionary's directions and bias, to be coded by `method`.

        Args:
            dictionary: Any dictionary, trained or fitted.
            method: See the class.
            k: Latents per row; the dictionary's own k or target L0, rounded, when left out.
            penalty: For fista; `set_penalty` finds one when left out.

        Raises:
            InputError: if k is left out and the dictionary has none.
        """
        if k is None:
            own = getattr(dictionary, "k", None) or getattr(dictionary, "target_l0", None)
            if own is None:
                raise InputError(
                    f"`k` must be given for a {type(dictionary).__name__}, which has none of its own."
                )
            k = max(1, round(own))
        directions = dictionary.directions
        refined = cls(dictionary.d_model, dictionary.n_latents, k, method, penalty).to(directions)
        refined.W_dec.copy_(directions)
        refined.b_dec.copy_(dictionary.decode(directions.new_zeros(dictionary.n_latents)))
        return refined.eval()

    def set_penalty(self, x: Float[Tensor, "rows d_model"]) -> float:
        """Finds and keeps the penalty at which fista codes these rows with k latents on average.

        Args:
            x: A sample of rows in raw units; a thousand are plenty.
        """
        if self.method != "fista":
            raise InputError(f"`method` must be 'fista' to have a penalty, got method={self.method!r}.")
        self.penalty = fista_penalty_for_l0(self._centred(x), self.W_dec, float(self.k))
        return self.penalty

    @property
    def inference(self) -> str:
        """The rule as saved; it needs W_dec and b_dec alone."""
        if self.method == "fista":
            return (
                f"latents = argmin over z >= 0 of |x - b_dec - z @ W_dec|^2 / 2 + {self.penalty} * sum(z),"
                " its non-zero entries refitted by non-negative least squares"
            )
        return f"latents = {self.method}(x - b_dec, atoms=W_dec, k={self.k}), non-negative"

    @property
    def config(self) -> dict[str, Any]:
        """The constructor's arguments; `penalty` as found."""
        shape = {"d_model": self.d_model, "n_latents": self.n_latents, "k": self.k}
        return {**shape, "method": self.method, "penalty": self.penalty}

    @property
    def directions(self) -> Float[Tensor, "n_latents d_model"]:
        """W_dec."""
        return self.W_dec

    def encode_sparse(self, x: Float[Tensor, "... d_model"]) -> SparseLatents:
        """The code found for every row, in raw units, one CSR row per vector of x."""
        centred = self._centred(x)
        if self.method != "fista":
            return _PURSUITS[self.method](centred, self.W_dec, self.k)
        if self.penalty is None:
            raise InputError("`penalty` must be set before fista can code, got None; call set_penalty(rows).")
        return fista(centred, self.W_dec, self.penalty, refit=True)

    def encode(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... n_latents"]:
        """The same, dense."""
        return self.encode_sparse(x).to_dense(self.n_latents).reshape(*x.shape[:-1], self.n_latents)

    def decode(self, latents: Float[Tensor, "... n_latents"]) -> Float[Tensor, "... d_model"]:
        """latents @ W_dec + b_dec."""
        return latents.to(self.W_dec.dtype) @ self.W_dec + self.b_dec

    def _decode_sparse(self, latents: SparseLatents) -> Float[Tensor, "rows d_model"]:
        """The same from a sparse code, touching only the rows it names."""
        return sparse_decode(latents, self.W_dec) + self.b_dec

    def saved_tensors(self) -> dict[str, Tensor]:
        """W_dec with unit rows and b_dec, in raw units; there is no linear encoder."""
        return {"W_dec": self.W_dec.clone(), "b_dec": self.b_dec.clone()}

    @torch.no_grad()
    def load_saved_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes W_dec and b_dec."""
        self.W_dec.copy_(tensors["W_dec"])
        self.b_dec.copy_(tensors["b_dec"])

    def _centred(self, x: Tensor) -> Tensor:
        return self.rows_of(x).to(self.b_dec.dtype) - self.b_dec
