"""PCA and NMF beside the autoencoder: fitted on the same rows, scored on the same held-out rows."""

from __future__ import annotations

import time
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import lightning
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from sae.activations import ActivationDataModule
from sae.activations.cache import RowBatch
from sae.baselines import NMF, PCA, Baseline
from sae.errors import InputError
from sae.ops.group import ALONE, Group
from sae.ops.metrics import ReconstructionMetrics, ReconstructionScores
from sae.ops.sparse import SparseLatents
from sae.training import SparseAutoencoderModule
from sae.training.names import SINGLE, curve


class BaselineCallback(lightning.Callback):
    """Fits one baseline before training and scores it at every validation.

    At the autoencoder's own L0: unit atoms, the same mean, k = round(l0) coefficients a row. Scores go
    to `baseline/<name>/...` in the logs and to `metrics()["baselines"][<name>]`. Where several dictionaries
    are trained it is fitted once, and scored at the L0 of each.
    """

    name: str

    def __init__(self, n_components: int | None, curve: list[int] | None, max_rows: int) -> None:
        for argument, value in (("max_rows", max_rows), ("n_components", n_components)):
            if value is not None and value < 1:
                raise InputError(f"`{argument}` must be at least 1, got {argument}={value}.")
        if curve is not None and any(r < 1 for r in curve):
            raise InputError(f"`curve` must hold numbers of components, at least 1, got {curve}.")
        self._n_components = n_components
        self._curve_at = curve
        self._max_rows = max_rows
        self._settings = {"n_components": n_components, "curve": curve, "max_rows": max_rows}
        self._fitted: Baseline | None = None
        self._fit_s = 0.0
        self._curve: dict[str, float | None] = {}
        self._scores: dict[int, ReconstructionScores] = {}
        self._at: dict[str, int] = {}
        self._logged_at: int | None = None

    def state_dict(self) -> dict[str, Any]:
        """The fit and its scores, so that a resumed run need not fit again."""
        return {
            "settings": self._settings,
            "fitted": None if self._fitted is None else self._fitted.state_dict(),
            "shape": None if self._fitted is None else [self._fitted.d_model, self._fitted.n_latents],
            "fit_s": self._fit_s,
            "curve": self._curve,
            "scores": {k: scores._asdict() for k, scores in self._scores.items()},
            "logged_at": self._logged_at,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes them, unless the baseline has been described anew since."""
        if state_dict["fitted"] is None or state_dict["settings"] != self._settings:
            return
        self._fitted = self.make(*state_dict["shape"])
        self._fitted.load_state_dict(state_dict["fitted"])
        self._fit_s, self._curve = state_dict["fit_s"], state_dict["curve"]
        self._scores = {k: ReconstructionScores(**scores) for k, scores in state_dict["scores"].items()}
        self._logged_at = state_dict["logged_at"]

    @abstractmethod
    def make(self, d_model: int, n_components: int | None) -> Baseline:
        """A fresh baseline."""

    @property
    def baseline(self) -> Baseline:
        """The fitted baseline.

        Raises:
            InputError: before training has started.
        """
        if self._fitted is None:
            raise InputError(f"the {self.name} baseline is fitted when training starts; it has not started.")
        return self._fitted

    def k_for(self, name: str) -> int:
        """Coefficients per row at the last scoring: the L0 of the dictionary of that name."""
        assert name in self._at, "asked before the first validation"
        return self._at[name]

    def reconstruct(self, x: Float[Tensor, "rows d_model"], k: int) -> Float[Tensor, "rows d_model"]:
        """Rows written with k coefficients each."""
        x = x.to(self.baseline.device, torch.float32)
        return self.baseline.decode_sparse(self.baseline.sparse_code(x, k))

    def metrics(self, name: str = SINGLE) -> dict[str, Any]:
        """What goes into metrics.json, beside the scores of the dictionary of that name."""
        if name not in self._at or self._fitted is None:
            return {}
        scores = self._scores[self._at[name]]._asdict()
        extra = {
            "n_latents": self._fitted.n_latents,
            "k": self._at[name],
            "fit_s": round(self._fit_s, 2),
            "fvu_by_components": self._curve,
        }
        return {"baselines": {self.name: scores | extra}}

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: SparseAutoencoderModule) -> None:
        """Fits the baseline, and its curve over the number of components."""
        data, device = _datamodule(trainer), pl_module.device
        if self._fitted is not None:  # it came with the checkpoint
            self._fitted.to(device)
            return
        group = Group.of_training(device)
        curve_at = [data.d_model // part for part in (8, 4, 2)] if self._curve_at is None else self._curve_at
        numbers = [self._n_components, *sorted({max(1, r) for r in curve_at})]
        hidden = not trainer.is_global_zero
        for r in tqdm(numbers, desc=f"fit {self.name}", leave=False, disable=hidden):
            begin = time.perf_counter()
            fitted = self._fit(data, r, device, group)
            if self._fitted is None:
                self._fitted, self._fit_s = fitted, time.perf_counter() - begin
            self._curve[str(fitted.n_latents)] = _score(fitted, data, None, group).fvu

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: SparseAutoencoderModule) -> None:
        """Scores the baseline at the L0 that the autoencoder has now."""
        if not trainer.sanity_checking:
            self._score_at_l0_of(trainer, pl_module)

    def on_test_end(self, trainer: lightning.Trainer, pl_module: SparseAutoencoderModule) -> None:
        """Scores the baseline at the final L0."""
        self._score_at_l0_of(trainer, pl_module)

    def _score_at_l0_of(self, trainer: lightning.Trainer, pl_module: SparseAutoencoderModule) -> None:
        assert pl_module.held_out.scores, "scored before the first validation"
        for name, scores in pl_module.held_out.scores.items():
            self._at[name] = k = max(1, round(scores.l0))
            if k not in self._scores:
                group = Group.of_training(pl_module.device)
                self._scores[k] = _score(self.baseline, _datamodule(trainer), k, group)
        if self._logged_at == trainer.global_step:  # the test after the last validation
            return
        self._logged_at = trainer.global_step
        for name, k in self._at.items():
            known = {key: value for key, value in self._scores[k]._asdict().items() if value is not None}
            points = {curve(f"baseline/{self.name}", name, key): value for key, value in known.items()}
            for logger in trainer.loggers:
                logger.log_metrics(points, trainer.global_step)

    def _fit(
        self, data: ActivationDataModule, n_components: int | None, device: torch.device, group: Group = ALONE
    ) -> Baseline:
        baseline = self.make(data.d_model, n_components).to(device)
        return baseline.fit(_TrainRows(data, self._max_rows, device), data.moments, group)


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
        super().__init__(n_components, curve, max_rows=1)

    def make(self, d_model: int, n_components: int | None) -> Baseline:
        """A PCA."""
        return PCA(d_model, n_components)


class NMFBaseline(BaselineCallback):
    """Non-negative matrix factorisation of the rows split into positive and negative parts.

    At equal L0 a row is coded by non-negative orthogonal pursuit of k atoms.
    """

    name = "nmf"

    def __init__(
        self, n_components: int | None = None, curve: list[int] | None = None, max_rows: int = 100_000
    ) -> None:
        """Describes the baseline.

        Args:
            n_components: atoms; null = d_model.
            curve: numbers of atoms for FVU against components (all of them used per row); null =
                d_model / 8, / 4, / 2.
            max_rows: rows that it is fitted on, a random sample of the train split.
        """
        super().__init__(n_components, curve, max_rows)

    def make(self, d_model: int, n_components: int | None) -> Baseline:
        """An NMF."""
        return NMF(d_model, n_components or d_model)


class _TrainRows:
    """Up to `max_rows` train rows, again for every iteration."""

    def __init__(self, data: ActivationDataModule, max_rows: int, device: torch.device) -> None:
        self._data, self._max_rows, self._device = data, max_rows, device

    def __iter__(self) -> Iterator[Tensor]:
        given = 0
        for batch in self._data.cache.batches("train", self._data.hookpoint, 8192):
            x = batch.x[: self._max_rows - given]
            yield x.to(self._device, torch.float32)
            given += len(x)
            if given >= self._max_rows:
                return


def _datamodule(trainer: lightning.Trainer) -> ActivationDataModule:
    return trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]


@torch.inference_mode()
def _score(
    baseline: Baseline, data: ActivationDataModule, k: int | None, group: Group = ALONE
) -> ReconstructionScores:
    """Held-out scores with k coefficients per row, or (None) with all of them; ranks share the rows."""
    metrics = ReconstructionMetrics(baseline.n_latents, data.moments.mean)
    batch: RowBatch
    for batch in data.val_dataloader():
        x = batch.x.to(baseline.device, torch.float32)
        code: SparseLatents = baseline.encode_sparse(x) if k is None else baseline.sparse_code(x, k)
        first = None if batch.position is None else batch.position.to(x.device) == 0
        metrics.add(x, baseline.decode_sparse(code), code, first)
    metrics.merge(group)
    return metrics.compute()
