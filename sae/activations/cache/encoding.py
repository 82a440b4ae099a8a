"""How rows are stored: as they are in a float dtype, or as int8 with a scale per row."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.activations.cache.format import dtype_name
from sae.ops.int8 import Int8Rows, dequantise, quantise

Rows = slice | Int[Tensor, " some"]


class Encoding:
    """Turns activations into the tensors of a shard, and back.

    A hookpoint's rows are one tensor of its name; for int8 there are `<name>.scale` (float32, per row)
    and `<name>.outliers` (float32, the coordinates that stand apart, listed in the manifest) beside it.
    """

    def __init__(self, dtype: torch.dtype, outliers: Mapping[str, list[int]] | None = None) -> None:
        """Describes it.

        Args:
            dtype: of the stored rows.
            outliers: for int8, the coordinates of each hookpoint that stand apart.
        """
        self.dtype = dtype
        self._outliers = {name: torch.tensor(v, dtype=torch.int64) for name, v in (outliers or {}).items()}

    @classmethod
    def of_manifest(cls, manifest: Mapping[str, object]) -> Encoding:
        """The encoding that a cache was written with."""
        return cls(getattr(torch, str(manifest["dtype"])), manifest.get("outliers"))  # pyright: ignore

    def describe(self) -> dict[str, object]:
        """Its part of the manifest."""
        found: dict[str, object] = {"dtype": dtype_name(self.dtype)}
        if not self.is_plain:
            found["outliers"] = {name: v.tolist() for name, v in self._outliers.items()}
        return found

    @property
    def is_plain(self) -> bool:
        """Whether rows are stored as they are."""
        return self.dtype != torch.int8

    @property
    def row_dtype(self) -> torch.dtype:
        """The dtype that rows are read back in."""
        return self.dtype if self.is_plain else torch.float32

    def encode(self, hookpoint: str, x: Float[Tensor, "rows d_model"]) -> dict[str, Tensor]:
        """The tensors to store, each with a first axis over rows, on the device of x."""
        if self.is_plain:
            return {hookpoint: x.to(self.dtype)}
        values, scale, outliers = quantise(x, self._outliers[hookpoint].to(x.device))
        return {hookpoint: values, f"{hookpoint}.scale": scale, f"{hookpoint}.outliers": outliers}

    def decode(
        self, hookpoint: str, stored: Mapping[str, Tensor], rows: Rows
    ) -> Float[Tensor, "some d_model"]:
        """Rows again, from the tensors of a shard."""
        if self.is_plain:
            return stored[hookpoint][rows]
        names = (hookpoint, f"{hookpoint}.scale", f"{hookpoint}.outliers")
        return dequantise(Int8Rows(*(stored[name][rows] for name in names)), self._outliers[hookpoint])

    def finite(self, hookpoint: str, stored: Mapping[str, Tensor]) -> Tensor:
        """Which rows are finite: a row that was not has a scale, or an outlier, that is not."""
        if self.is_plain:
            return _finite_rows(stored[hookpoint])
        return stored[f"{hookpoint}.scale"].isfinite() & _finite_rows(stored[f"{hookpoint}.outliers"])


def row_bytes(d_models: Mapping[str, int], encoding: Encoding) -> int:
    """Bytes that one row takes on disk: every hookpoint, its sequence and its position."""
    probes = [encoding.encode(name, torch.zeros(1, d_model)) for name, d_model in d_models.items()]
    return sum(t.nbytes for probe in probes for t in probe.values()) + 2 * torch.int32.itemsize


def _finite_rows(x: Tensor) -> Tensor:
    """A finite sum of all shows in one pass that all are; only otherwise rows are looked at one by one."""
    if all(chunk.sum(dtype=torch.float32).isfinite() for chunk in x.split(4096)):
        return torch.ones(len(x), dtype=torch.bool)
    return torch.cat([chunk.isfinite().all(-1) for chunk in x.split(4096)])
