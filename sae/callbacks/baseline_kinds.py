"""The baselines that a configuration can list, each by one callback."""

from __future__ import annotations

from typing import Any, Literal

import torch

from sae.baselines import (
    ICA,
    NMF,
    PCA,
    Baseline,
    DictionaryLearning,
    KMeans,
    NaturalBasis,
    RandomDirections,
    SemiNMF,
)
from sae.baselines.natural import KURTOSIS_AT
from sae.callbacks.baselines import BaselineCallback, Wanted
from sae.errors import InputError
from sae.training import SparseAutoencoderModule
from sae.training.names import SINGLE


class PCABaseline(BaselineCallback):
    """Principal components, exact from the cache's second moments.

    At equal L0 a row keeps its k largest coefficients among all components.
    """

    name = "pca"

    def __init__(self, n_components: int | None = None, curve: list[int] | None = None) -> None:
        """Describes the baseline.

        Args:
            n_components: components to choose the k largest coefficients from; null = d_model.
            curve: numbers of components for FVU against components (all of them used per row);
                null = d_model / 8, / 4, / 2.
        """
        super().__init__(n_components, curve, max_rows=1, keep=False)

    def make(self, wanted: Wanted) -> Baseline:
        """A PCA."""
        return PCA(wanted.d_model, wanted.n_components)


class NMFBaseline(BaselineCallback):
    """Non-negative matrix factorisation, with one of four ways to make signed rows non-negative.

    At equal L0 a row is coded by orthogonal pursuit of k atoms: non-negative where rows are split, of both
    signs elsewhere. Named `nmf`, or `nmf_shift`, `nmf_stack`, `nmf_none`.
    """

    def __init__(
        self,
        n_components: int | None = None,
        curve: list[int] | None = None,
        max_rows: int = 100_000,
        signs: Literal["split", "shift", "stack", "none"] = "split",
        solver: Literal["online", "hals", "mu"] = "online",
        seeds: int = 1,
        keep: bool = True,
    ) -> None:
        """Describes the baseline.

        Args:
            n_components: atoms; null = d_model.
            curve: numbers of atoms for FVU against components (all of them used per row); null =
                d_model / 8, / 4, / 2.
            max_rows: rows that it is fitted on, a random sample of the train split.
            signs: split each row into its positive and negative part, shift by the lowest value of each
                coordinate, stack both parts as rows, or none for rows that are non-negative.
            solver: online with fading sums, or sweeps over all rows by hals or multiplicative updates (mu).
            seeds: fits from so many starts, for `stability`; the first one is the baseline.
            keep: whether fits are kept with the cache.
        """
        super().__init__(n_components, curve, max_rows, seeds, keep)
        self._signs, self._solver = signs, solver
        self.name = "nmf" if signs == "split" else f"nmf_{signs}"
        self._settings |= {"signs": signs, "solver": solver}

    def make(self, wanted: Wanted) -> Baseline:
        """An NMF."""
        n = wanted.n_components or wanted.d_model
        return NMF(wanted.d_model, n, seed=wanted.seed, signs=self._signs, solver=self._solver)


class SemiNMFBaseline(BaselineCallback):
    """Semi-NMF: atoms of either sign, coefficients that only add up; the decoder of an autoencoder."""

    name = "semi_nmf"

    def __init__(
        self,
        n_components: int | None = None,
        curve: list[int] | None = None,
        max_rows: int = 100_000,
        solver: Literal["online", "sweeps"] = "online",
        seeds: int = 1,
        keep: bool = True,
    ) -> None:
        """Describes the baseline.

        Args:
            n_components: atoms, more than d_model if you like; null = d_model.
            curve: numbers of atoms for FVU against components; null = d_model / 8, / 4, / 2.
            max_rows: rows that it is fitted on, a random sample of the train split.
            solver: online with fading sums, or sweeps over all rows with exact codes, slowly.
            seeds: fits from so many starts, for `stability`; the first one is the baseline.
            keep: whether fits are kept with the cache.
        """
        super().__init__(n_components, curve, max_rows, seeds, keep)
        self._solver = solver
        self._settings |= {"solver": solver}

    def make(self, wanted: Wanted) -> Baseline:
        """A semi-NMF."""
        n = wanted.n_components or wanted.d_model
        return SemiNMF(wanted.d_model, n, seed=wanted.seed, solver=self._solver)


class ICABaseline(BaselineCallback):
    """Independent components; at equal L0 a row is coded by orthogonal pursuit of k of them."""

    name = "ica"

    def __init__(
        self,
        n_components: int | None = None,
        curve: list[int] | None = None,
        max_rows: int = 100_000,
        seeds: int = 1,
        keep: bool = True,
    ) -> None:
        """Describes the baseline.

        Args:
            n_components: independent components; null = d_model.
            curve: numbers of components for FVU against components; null = none, as they are PCA's there.
            max_rows: rows that it is fitted on, a random sample of the train split.
            seeds: fits from so many starts, for `stability`; the first one is the baseline.
            keep: whether fits are kept with the cache.
        """
        super().__init__(n_components, [] if curve is None else curve, max_rows, seeds, keep)

    def make(self, wanted: Wanted) -> Baseline:
        """An ICA."""
        return ICA(wanted.d_model, wanted.n_components, seed=wanted.seed)


class KMeansBaseline(BaselineCallback):
    """Centroids as atoms; at equal L0 a row is coded by non-negative pursuit of k of them."""

    name = "kmeans"

    def __init__(
        self,
        n_components: int | None = None,
        max_rows: int = 100_000,
        seeds: int = 1,
        keep: bool = True,
    ) -> None:
        """Describes the baseline.

        Args:
            n_components: centroids; null = as many as the widest dictionary has latents.
            max_rows: rows that it is fitted on, a random sample of the train split.
            seeds: fits from so many starts, for `stability`; the first one is the baseline.
            keep: whether fits are kept with the cache.
        """
        super().__init__(n_components, [], max_rows, seeds, keep)

    def prepare(self, pl_module: SparseAutoencoderModule) -> None:
        """Takes the width."""
        self._n_components = self._n_components or _widest(pl_module)

    def make(self, wanted: Wanted) -> Baseline:
        """A k-means."""
        return KMeans(wanted.d_model, wanted.n_components or wanted.d_model, seed=wanted.seed)


class DictionaryLearningBaseline(BaselineCallback):
    """Dictionary learning with orthogonal matching pursuit: no encoder, no gradients, as wide as asked."""

    def __init__(
        self,
        n_components: int | None = None,
        k: int | list[int] | None = None,
        method: Literal["online", "ksvd"] = "online",
        max_rows: int = 50_000,
        seeds: int = 1,
        keep: bool = True,
    ) -> None:
        """Describes the baseline.

        Args:
            n_components: atoms; null = as many as the widest dictionary has latents.
            k: coefficients of a row while it learns. With several it is learned for each, and scored at an
                L0 as learned for the nearest; null = every k or target L0 that a dictionary has.
            method: online (sums that forget) or ksvd (atom by atom).
            max_rows: rows that it is fitted on, a random sample of the train split.
            seeds: fits from so many starts, for `stability`; the first one is the baseline.
            keep: whether fits are kept with the cache.
        """
        ks = [] if k is None else [k] if isinstance(k, int) else k
        if (k is not None and not ks) or any(one < 1 for one in ks):
            raise InputError(f"`k` must be at least 1, or several such, got k={k}.")
        super().__init__(n_components, [], max_rows, seeds, keep)
        self.name = "dictionary_learning" if method == "online" else method
        self._method, self._ks = method, sorted(set(ks))
        self._settings |= {"method": method, "k": k}

    def prepare(self, pl_module: SparseAutoencoderModule) -> None:
        """Takes the width, and what to learn for."""
        self._n_components = self._n_components or _widest(pl_module)
        dictionaries = list(pl_module.dictionaries.values())
        own = [getattr(one, "k", None) or getattr(one, "target_l0", None) for one in dictionaries]
        ks = self._ks or sorted({max(1, round(l0)) for l0 in own if l0 is not None})
        if not ks:
            raise InputError(
                f"`k` of {self.name} must be given: {type(dictionaries[0]).__name__} has no L0 of its own."
            )
        self._l0s = list(ks)

    def make(self, wanted: Wanted) -> Baseline:
        """A learned dictionary."""
        n = wanted.n_components or wanted.d_model
        k = min(wanted.l0 or 1, n)
        return DictionaryLearning(wanted.d_model, n, k, method=self._method, seed=wanted.seed)


class NaturalBaseline(BaselineCallback):
    """The coordinates of the residual stream themselves; a row keeps its k largest.

    metrics.json has also `kurtosis`, how heavy the coordinates' tails are, and `kurtosis_rotated`, the same
    under random rotations (`sae.baselines.NaturalBasis`): both at the `KURTOSIS_AT` of the coordinates.
    """

    name = "natural"

    def __init__(self) -> None:
        super().__init__(None, [], max_rows=100_000)

    def make(self, wanted: Wanted) -> Baseline:
        """The natural basis."""
        return NaturalBasis(wanted.d_model)

    def metrics(self, name: str = SINGLE) -> dict[str, Any]:
        """With both kurtoses."""
        found = super().metrics(name)
        if found:
            fitted = self.baseline_for(self.k_for(name))
            at = torch.tensor(KURTOSIS_AT, dtype=torch.float64)
            for which in ("kurtosis", "kurtosis_rotated"):
                values = getattr(fitted, which).double().cpu().flatten().quantile(at)
                found["baselines"][self.name][which] = values.tolist()
        return found


class RandomBaseline(BaselineCallback):
    """Random directions, coded by orthogonal pursuit: what learning the directions has to beat."""

    name = "random"

    def __init__(self, n_components: int | None = None) -> None:
        """Describes the baseline.

        Args:
            n_components: directions; null = as many as the widest dictionary has latents.
        """
        super().__init__(n_components, [], max_rows=1, keep=False)

    def prepare(self, pl_module: SparseAutoencoderModule) -> None:
        """Takes the width."""
        self._n_components = self._n_components or _widest(pl_module)

    def make(self, wanted: Wanted) -> Baseline:
        """Random directions."""
        n = wanted.n_components or wanted.d_model
        return RandomDirections(wanted.d_model, n, seed=wanted.seed)


def _widest(pl_module: SparseAutoencoderModule) -> int:
    return max(dictionary.n_latents for dictionary in pl_module.dictionaries.values())
