"""What is measured: widths, latents, rows, dtype and device of a training step."""

from __future__ import annotations

from typing import NamedTuple

import torch

from sae.errors import InputError


class Case(NamedTuple):
    """One training step's sizes."""

    d_model: int
    n_latents: int
    k: int
    rows: int
    dtype: str = "float32"
    """Of the encoder's product: float32, or bfloat16 by autocast with weights in float32."""
    device: str = "cpu"

    def __str__(self) -> str:
        return f"({self.d_model:,}, {self.n_latents:,}, {self.k}, {self.rows:,}) {self.dtype} {self.device}"

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype as torch's."""
        return getattr(torch, self.dtype)

    def batches(self, n: int = 4) -> list[torch.Tensor]:
        """Random rows with a few strong directions, so that latents do not all fire alike."""
        generator = torch.Generator().manual_seed(0)
        spread = torch.linspace(2.0, 0.5, self.d_model)
        return [
            (torch.randn(self.rows, self.d_model, generator=generator) * spread).to(self.device)
            for _ in range(n)
        ]


CPU_CASES = (Case(256, 4096, 32, 2048), Case(512, 8192, 32, 2048), Case(768, 16384, 32, 2048))
_GPU = (
    (768, 32768, 32, 8192),
    (768, 32768, 32, 32768),
    (1600, 51200, 32, 8192),
    (4096, 131072, 64, 8192),
)
GPU_CASES = tuple(Case(*sizes, dtype, "cuda") for sizes in _GPU for dtype in ("bfloat16", "float32"))


def parse(text: str, dtype: str, device: str) -> Case:
    """A case from "d_model,n_latents,k,rows".

    Raises:
        InputError: unless it is four positive whole numbers, with k at most n_latents.
    """
    parts = text.split(",")
    if len(parts) != 4 or not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise InputError(f"`--case` must be d_model,n_latents,k,rows, got {text!r}; e.g. 512,8192,32,2048.")
    case = Case(*(int(part) for part in parts), dtype=dtype, device=device)
    if case.k > case.n_latents:
        raise InputError(f"`--case` must have k <= n_latents, got {text!r}.")
    return case
