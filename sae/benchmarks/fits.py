"""Whole fits of baselines against scikit-learn's, on the same planted rows and by the same measure."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import torch
from jaxtyping import Float
from sklearn import cluster, decomposition
from sklearn.exceptions import ConvergenceWarning
from torch import Tensor
from torch.nn import functional as F

from sae.baselines import ICA, NMF, PCA, Baseline, DictionaryLearning, KMeans
from sae.benchmarks.nmf import COMPONENTS, WIDTH, planted_rows
from sae.errors import InputError
from sae.ops.moments import StreamingMoments
from sae.ops.nonnegative import nonnegative_codes
from sae.ops.pursuit import orthogonal_pursuit
from sae.ops.sparse import sparse_decode

D_MODEL, DIRECTIONS, K = 128, 256, 8
"""Of the rows that are not NMF's: width, planted directions, of which so many make a row on average."""
_BATCH = 1024
_Kind = TypeVar("_Kind", bound=Baseline)


class Contest(NamedTuple):
    """One baseline and a solver of scikit-learn's; each gives what it learned as rows."""

    ours: Callable[[], Float[Tensor, "n width"]]
    theirs: Callable[[], Float[Tensor, "n width"]]
    left: Callable[[Float[Tensor, "n width"]], float]
    """What the learned rows leave of the data, or how far they are from the truth: less is better."""


def fit_figures(n_rows: int) -> dict[str, float]:
    """Of every baseline our time over scikit-learn's, and what is left over what is left by scikit-learn's.

    Its solvers are those that take rows in mini-batches, where there are any: nothing else of it can be
    fitted to a cache that memory does not hold. Each is fitted once, and stops by its own rule.

    Raises:
        InputError: if there are too few rows to fit.
    """
    if n_rows < _BATCH:
        raise InputError(f"`--fit-rows` must be at least {_BATCH}, got {n_rows}.")
    found = {}
    for name, contest in _contests(n_rows).items():
        begun = time.perf_counter()
        ours = contest.ours()
        between = time.perf_counter()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # its default number of steps is its own
            theirs = contest.theirs()
        ended = time.perf_counter()
        found[f"{name}: time over scikit-learn's"] = (between - begun) / (ended - between)
        found[f"{name}: what is left over what scikit-learn's leaves"] = contest.left(ours) / contest.left(
            theirs
        )
    return found


def _contests(n_rows: int) -> dict[str, Contest]:
    return {
        "PCA, IncrementalPCA": _of_pca(sparse_rows(n_rows)),
        "k-means, MiniBatchKMeans": _of_kmeans(sparse_rows(n_rows)),
        "ICA, FastICA": _of_ica(n_rows),
        "dictionary learning, MiniBatchDictionaryLearning": _of_dictionary_learning(sparse_rows(n_rows)),
        "NMF, MiniBatchNMF": _of_nmf(planted_rows(n_rows, 0)[0]),
    }


def _of_pca(rows: Float[Tensor, "rows width"]) -> Contest:
    kept = D_MODEL // 2
    centred = rows - rows.mean(dim=0)
    solver = decomposition.IncrementalPCA(kept, batch_size=_BATCH)
    return Contest(
        lambda: _fitted(PCA(D_MODEL, kept), rows).directions,
        lambda: torch.from_numpy(solver.fit(rows.numpy()).components_).float(),
        lambda basis: (centred - centred @ basis.T @ basis).square().sum().item(),
    )


def _of_kmeans(rows: Float[Tensor, "rows width"]) -> Contest:
    solver = cluster.MiniBatchKMeans(DIRECTIONS, batch_size=_BATCH, random_state=0)

    def ours() -> Tensor:
        fitted = _fitted(KMeans(D_MODEL, DIRECTIONS), rows)
        return fitted.mean + fitted.directions * fitted.lengths[:, None]

    return Contest(
        ours,
        lambda: torch.from_numpy(solver.fit(rows.numpy()).cluster_centers_),
        lambda centres: torch.cdist(rows, centres).amin(dim=1).square().sum().item(),
    )


def _of_ica(n_rows: int) -> Contest:
    draws = torch.Generator().manual_seed(0)
    mixing = F.normalize(torch.randn(D_MODEL, D_MODEL, generator=draws), dim=1)
    rows = torch.randn(n_rows, D_MODEL, generator=draws).pow(3) @ mixing
    solver = decomposition.FastICA(whiten="unit-variance", random_state=0)

    def missing(found: Tensor) -> float:
        """1 - mean |cos| of each planted direction with the nearest found one."""
        return 1 - (mixing @ F.normalize(found, dim=1).T).abs().amax(dim=1).mean().item()

    return Contest(
        lambda: _fitted(ICA(D_MODEL), rows).directions,
        lambda: torch.from_numpy(solver.fit(rows.numpy()).mixing_.T.copy()),
        missing,
    )


def _of_dictionary_learning(rows: Float[Tensor, "rows width"]) -> Contest:
    centred = rows - rows.mean(dim=0)
    solver = decomposition.MiniBatchDictionaryLearning(DIRECTIONS, batch_size=_BATCH, random_state=0)

    def left(atoms: Tensor) -> float:
        """By orthogonal pursuit with as many atoms a row as planted ones in the mean."""
        code = orthogonal_pursuit(centred, atoms, K)
        return (centred - sparse_decode(code, atoms)).square().sum().item()

    return Contest(
        lambda: _fitted(DictionaryLearning(D_MODEL, DIRECTIONS, k=K), rows).directions,
        lambda: F.normalize(torch.from_numpy(solver.fit(centred.numpy()).components_).float(), dim=1),
        left,
    )


def _of_nmf(rows: Float[Tensor, "rows width"]) -> Contest:
    solver = decomposition.MiniBatchNMF(COMPONENTS, batch_size=_BATCH, random_state=0)

    def left(components: Tensor) -> float:
        """By the best codes on the components."""
        codes = nonnegative_codes(components @ components.T, rows @ components.T)
        return (rows - codes @ components).square().sum().item()

    return Contest(
        lambda: _fitted(NMF(WIDTH, COMPONENTS, signs="none"), rows).components,
        lambda: torch.from_numpy(solver.fit(rows.numpy()).components_),
        left,
    )


def sparse_rows(n_rows: int) -> Float[Tensor, "rows width"]:
    """Sums of K of the planted unit directions in the mean, with noise, about a mean that is not zero."""
    draws = torch.Generator().manual_seed(0)
    directions = F.normalize(torch.randn(DIRECTIONS, D_MODEL, generator=draws), dim=1)
    firing = torch.rand(n_rows, DIRECTIONS, generator=draws) < K / DIRECTIONS
    codes = firing * (1 + torch.rand(n_rows, DIRECTIONS, generator=draws))
    return codes @ directions + 0.05 * torch.randn(n_rows, D_MODEL, generator=draws) + 0.5


def _fitted(baseline: _Kind, rows: Float[Tensor, "rows width"]) -> _Kind:
    moments = StreamingMoments()
    moments.add(rows)
    return baseline.fit(list(rows.split(8192)), moments.moments())
