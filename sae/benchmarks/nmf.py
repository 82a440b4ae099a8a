"""NMF's fit against scikit-learn's, both to their ends, on the same non-negative rows."""

from __future__ import annotations

import time

import torch
from jaxtyping import Float
from sklearn.decomposition import NMF as ScikitNMF
from torch import Tensor
from torch.nn import functional as F

from sae.baselines import NMF
from sae.errors import InputError
from sae.ops.moments import StreamingMoments

WIDTH, COMPONENTS = 256, 128
_SWEEPS = 200
"""scikit-learn's default; it warns if it has not converged by then."""


def nmf_figures(n_rows: int, worlds: int = 1) -> dict[str, float]:
    """Of every planted world: our time and objective |X - Z H|² / |X|² over scikit-learn's, and parts found.

    Both objectives are of the best codes on the components found, so that neither is judged by how far its
    own codes had come. Minutes a world at 100,000 rows, so each is fitted once. Both end in a local minimum,
    and one planted part that is missed raises the objective by some hundredths: one world says little.

    Raises:
        InputError: if there is no world to fit.
    """
    if worlds < 1:
        raise InputError(f"`--nmf-worlds` must be at least 1, got {worlds}.")
    found = {}
    for world in range(worlds):
        found |= {f"{name}, world {world}": figure for name, figure in _figures_of(n_rows, world).items()}
    return found


def _figures_of(n_rows: int, world: int) -> dict[str, float]:
    rows, parts = planted_rows(n_rows, world)
    batches = list(rows.split(8192))
    moments = StreamingMoments()
    moments.add(rows)
    begun = time.perf_counter()
    ours = NMF(WIDTH, COMPONENTS, signs="none").fit(batches, moments.moments())
    fitted = time.perf_counter()
    theirs = ScikitNMF(COMPONENTS, init="nndsvda", max_iter=_SWEEPS, tol=1e-4).fit(rows.numpy())
    ended = time.perf_counter()
    objective, parts_found = ours.objective(batches), _share_found(parts, ours.components)
    ours.components.copy_(torch.from_numpy(theirs.components_))
    shape = f"{n_rows:,} x {WIDTH}, {COMPONENTS} components"
    return {
        f"NMF's time over scikit-learn's, {shape}": (fitted - begun) / (ended - fitted),
        f"NMF's objective over scikit-learn's, {shape}": objective / ours.objective(batches),
        "planted parts that NMF found": parts_found,
        "planted parts that scikit-learn found": _share_found(parts, ours.components),
    }


def _share_found(parts: Float[Tensor, "n width"], components: Float[Tensor, "n width"]) -> float:
    """Share of the parts with a component at cos above 0.95."""
    cosines = F.normalize(parts, dim=1) @ F.normalize(components, dim=1).T
    return (cosines.amax(dim=1) > 0.95).double().mean().item()


def planted_rows(
    n_rows: int, seed: int
) -> tuple[Float[Tensor, "rows width"], Float[Tensor, "components width"]]:
    """Sparse sums of sparse parts, with noise, none below zero; and the parts."""
    draws = torch.Generator().manual_seed(seed)
    parts = torch.rand(COMPONENTS, WIDTH, generator=draws)
    codes = torch.rand(n_rows, COMPONENTS, generator=draws)
    parts *= torch.rand(parts.shape, generator=draws) < 0.2
    codes *= torch.rand(codes.shape, generator=draws) < 0.1
    rows = codes @ parts
    noise = 0.3 * rows.std() * torch.randn(rows.shape, generator=draws)
    return (rows + noise).clamp_(min=0), parts
