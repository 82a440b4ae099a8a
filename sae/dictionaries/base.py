"""The contract that every dictionary keeps: trained autoencoders and fitted baselines alike."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae.errors import InputError
from sae.ops.sparse import SparseLatents, from_dense


class Output(NamedTuple):
    """What a dictionary makes of a batch."""

    x_hat: Float[Tensor, "... d_model"]
    """The reconstruction, in raw activation units."""
    latents: SparseLatents
    """The code behind it, one CSR row per vector (leading axes flattened), without zeros."""


class Dictionary(nn.Module, ABC):
    """A set of directions and a rule that writes a vector as a combination of few of them.

    Inputs and outputs are in raw activation units: centring and scaling happen inside. A kind is a
    subclass whose first constructor argument is `d_model`; its name is the name used in configs.
    """

    kinds: ClassVar[dict[str, type[Dictionary]]] = {}
    """Every concrete kind that has been imported, by class name."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not (cls.__name__.startswith("_") or getattr(cls.inference, "__isabstractmethod__", False)):
            Dictionary.kinds[cls.__name__] = cls

    def __init__(self, d_model: int, n_latents: int) -> None:
        super().__init__()
        for name, value in (("d_model", d_model), ("n_latents", n_latents)):
            if value < 1:
                raise InputError(f"`{name}` must be at least 1, got {name}={value}.")
        self.d_model = d_model
        self.n_latents = n_latents

    @property
    @abstractmethod
    def inference(self) -> str:
        """The exact selection rule as saved with the weights, e.g. `topk(relu(pre_acts), k=16)`."""

    @property
    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The constructor's arguments, JSON-serialisable: `type(d)(**d.config)` has the same shape."""

    @property
    @abstractmethod
    def directions(self) -> Float[Tensor, "n_latents d_model"]:
        """One unit row per latent."""

    @abstractmethod
    def encode(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... n_latents"]:
        """Latents of x, dense, in raw units."""

    @abstractmethod
    def decode(self, latents: Float[Tensor, "... n_latents"]) -> Float[Tensor, "... d_model"]:
        """Reconstruction from dense latents."""

    def decode_sparse(self, latents: SparseLatents) -> Float[Tensor, "rows d_model"]:
        """Reconstruction from a sparse code, one row per CSR row.

        Raises:
            InputError: if the code names latents that are not there, or its offsets are none.
        """
        latents.check(self.n_latents)
        return self._decode_sparse(latents)

    @abstractmethod
    def _decode_sparse(self, latents: SparseLatents) -> Float[Tensor, "rows d_model"]:
        """The same of a code that is known to be sound."""

    @abstractmethod
    def saved_tensors(self) -> dict[str, Tensor]:
        """The tensors of the saved form, raw units and unit directions (see `sae.dictionaries.storage`)."""

    @abstractmethod
    def load_saved_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes the tensors that `saved_tensors` gave."""

    def encode_sparse(self, x: Float[Tensor, "... d_model"]) -> SparseLatents:
        """The code of `encode` in CSR form, one row per vector of x."""
        return from_dense(self.encode(self.rows_of(x)))

    def rows_of(self, x: Float[Tensor, "... width"]) -> Float[Tensor, "rows d_model"]:
        """X with its leading axes flattened.

        Raises:
            InputError: if its last axis is not d_model wide.
        """
        if x.shape[-1] != self.d_model:
            raise InputError(
                f"`x` must have d_model={self.d_model} columns, got shape {tuple(x.shape)}; is it of another"
                " hookpoint or model?"
            )
        return x.reshape(-1, self.d_model)

    def forward(self, x: Float[Tensor, "... d_model"]) -> Output:
        """Encodes and decodes."""
        latents = self.encode_sparse(x)
        return Output(self._decode_sparse(latents).reshape(x.shape), latents)

    @property
    def device(self) -> torch.device:
        """Where the dictionary lies."""
        return self.directions.device

    def extra_repr(self) -> str:
        """Shows the arguments that were given in `print(dictionary)`."""
        return ", ".join(f"{name}={value}" for name, value in self.config.items() if value is not None)
