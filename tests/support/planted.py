"""Atoms and rows for the pursuits: random ones, and rows made of few atoms with known coefficients."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def unit_atoms(n: int, d: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """Random unit rows."""
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype), dim=1)


def random_rows(rows: int, d: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Gaussian rows, which no few atoms explain."""
    return torch.randn(rows, d, generator=torch.Generator().manual_seed(1), dtype=dtype)


def planted_codes(rows: int, n: int, k: int) -> Tensor:
    """K coefficients a row, each in [0.5, 1.5), on random atoms."""
    generator = torch.Generator().manual_seed(2)
    codes = torch.zeros(rows, n, dtype=torch.float64)
    for row in codes:
        row[torch.randperm(n, generator=generator)[:k]] = torch.rand(k, generator=generator).double() + 0.5
    return codes


def errors(x: Tensor, codes: Tensor, atoms: Tensor) -> Tensor:
    """|x - codes @ atoms| of every row."""
    return (x - codes @ atoms).norm(dim=1)
