"""NMF's fit against scikit-learn's, both to their ends, on the same non-negative rows."""

from __future__ import annotations

import time

import torch
from jaxtyping import Float
from sklearn.decomposition import NMF as ScikitNMF
from torch import Tensor

from sae.baselines import NMF
from sae.ops.moments import StreamingMoments

WIDTH, COMPONENTS = 256, 128
_SWEEPS = 200
"""scikit-learn's default; it warns if it has not converged by then."""


def nmf_figures(n_rows: int, seed: int = 0) -> dict[str, float]:
    """Time and objective |X - Z H|² / |X|² of ours over scikit-learn's; minutes at 100,000 rows.

    Both objectives are of the best codes on the components found, so that neither is judged by how far its
    own codes had come. Once each: a fit is long enough for its time to mean something.
    """
    rows = planted_rows(n_rows, seed)
    batches = list(rows.split(8192))
    moments = StreamingMoments()
    moments.add(rows)
    begun = time.perf_counter()
    ours = NMF(WIDTH, COMPONENTS, signs="none").fit(batches, moments.moments())
    fitted = time.perf_counter()
    theirs = ScikitNMF(COMPONENTS, init="nndsvda", max_iter=_SWEEPS, tol=1e-4).fit(rows.numpy())
    ended = time.perf_counter()
    objective = ours.objective(batches)
    ours.components.copy_(torch.from_numpy(theirs.components_))
    shape = f"{n_rows:,} x {WIDTH}, {COMPONENTS} components"
    return {
        f"NMF's time over scikit-learn's, {shape}": (fitted - begun) / (ended - fitted),
        f"NMF's objective over scikit-learn's, {shape}": objective / ours.objective(batches),
    }


def planted_rows(n_rows: int, seed: int) -> Float[Tensor, "rows width"]:
    """Sparse sums of sparse parts, with noise, none below zero."""
    draws = torch.Generator().manual_seed(seed)
    parts = torch.rand(COMPONENTS, WIDTH, generator=draws)
    codes = torch.rand(n_rows, COMPONENTS, generator=draws)
    parts *= torch.rand(parts.shape, generator=draws) < 0.2
    codes *= torch.rand(codes.shape, generator=draws) < 0.1
    rows = codes @ parts
    return (rows + 0.3 * rows.std() * torch.randn(rows.shape, generator=draws)).clamp_(min=0)
