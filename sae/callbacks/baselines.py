"""A baseline beside the autoencoder: fitted on the same rows, scored on the same held-out rows."""

from __future__ import annotations

import hashlib
import json
import time
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import lightning
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from sae.activations import ActivationDataModule
from sae.activations.cache import RowBatch
from sae.activations.cache.places import is_url
from sae.baselines import Baseline
from sae.baselines.kept import keep, kept
from sae.dictionaries import Dictionary
from sae.errors import InputError
from sae.ops.group import ALONE, Group
from sae.ops.metrics import ReconstructionMetrics, ReconstructionScores
from sae.ops.sparse import SparseLatents
from sae.ops.stability import share_found_again
from sae.training import SparseAutoencoderModule
from sae.training.names import SINGLE, curve


class Wanted(NamedTuple):
    """A baseline to be made."""

    d_model: int
    n_components: int | None
    """None = what its kind has by itself."""
    seed: int = 0
    l0: int | None = None
    """That it is to be learned for, where its kind learns for one."""


class _Fit(NamedTuple):
    baseline: Baseline
    fit_s: float
    stability: float | None


class BaselineCallback(lightning.Callback):
    """Fits one baseline before training and scores it at every validation.

    At the autoencoder's own L0: unit atoms, the same mean, k = round(l0) coefficients a row. Scores go
    to `baseline/<name>/...` in the logs and to `metrics()["baselines"][<name>]`. Where several dictionaries
    are trained it is fitted once, or once for each L0 where its learning depends on one, and scored at the
    L0 of each. A fit is kept in `baselines/` in the cache's folder, by a hash of the rows and of the
    settings, for whatever run asks for the same one; not where the cache is behind a URL or comes and goes,
    or its folder cannot be written to.
    """

    name: str

    def __init__(
        self,
        n_components: int | None,
        curve: list[int] | None,
        max_rows: int,
        seeds: int = 1,
        keep: bool = True,
    ) -> None:
        for argument, value in (("max_rows", max_rows), ("n_components", n_components), ("seeds", seeds)):
            if value is not None and value < 1:
                raise InputError(f"`{argument}` must be at least 1, got {argument}={value}.")
        if curve is not None and any(r < 1 for r in curve):
            raise InputError(f"`curve` must hold numbers of components, at least 1, got {curve}.")
        self._n_components = n_components
        self._curve_at = curve
        self._max_rows = max_rows
        self._seeds, self._keep = seeds, keep
        self._settings: dict[str, Any] = {
            "n_components": n_components,
            "curve": curve,
            "max_rows": max_rows,
            "seeds": seeds,
        }
        self._l0s: list[int | None] = [None]  # to learn for; None: its learning knows none
        self._fits: dict[int | None, _Fit] = {}
        self._curve: dict[str, float | None] = {}
        self._scores: dict[int, ReconstructionScores] = {}
        self._at: dict[str, int] = {}
        self._logged_at: int | None = None

    @property
    def state_key(self) -> str:
        """Of the checkpoint's part: several baselines of one class differ by their names."""
        return f"{type(self).__qualname__}-{self.name}"

    def state_dict(self) -> dict[str, Any]:
        """The fit and its scores, so that a resumed run need not fit again."""
        return {
            "baseline": self.name,
            "settings": self._settings,
            "fits": {
                l0: {
                    "kind": type(fit.baseline).__name__,
                    "revision": fit.baseline.revision,
                    "config": fit.baseline.config,
                    "state": fit.baseline.state_dict(),
                    "fit_s": fit.fit_s,
                    "stability": fit.stability,
                }
                for l0, fit in self._fits.items()
            },
            "curve": self._curve,
            "scores": {k: scores._asdict() for k, scores in self._scores.items()},
            "logged_at": self._logged_at,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes them, unless the baseline has been described anew since."""
        if not state_dict.get("fits") or state_dict["settings"] != self._settings:
            return
        if any(_revision(saved) != _kind(saved).revision for saved in state_dict["fits"].values()):
            return  # it would be fitted otherwise now
        for l0, saved in state_dict["fits"].items():
            self._fits[l0] = _Fit(_restored(saved), saved["fit_s"], saved["stability"])
        self._curve = state_dict["curve"]
        self._scores = {k: ReconstructionScores(**scores) for k, scores in state_dict["scores"].items()}
        self._logged_at = state_dict["logged_at"]

    @abstractmethod
    def make(self, wanted: Wanted) -> Baseline:
        """A fresh baseline."""

    def prepare(self, pl_module: SparseAutoencoderModule) -> None:
        """Takes what the baseline has to know of the autoencoders before it is made."""

    def baseline_for(self, k: int) -> Baseline:
        """The fitted baseline, of several the one that was learned for the L0 nearest to k.

        Raises:
            InputError: before training has started.
        """
        return self._fit_for(k).baseline

    def _fit_for(self, k: int) -> _Fit:
        if not self._fits:
            raise InputError(f"the {self.name} baseline is fitted when training starts; it has not started.")
        return self._fits[nearest_l0(self._fits, k)]

    def k_for(self, name: str) -> int:
        """Coefficients per row at the last scoring: the L0 of the dictionary of that name."""
        assert name in self._at, "asked before the first validation"
        return self._at[name]

    def reconstruct(self, x: Float[Tensor, "rows d_model"], k: int) -> Float[Tensor, "rows d_model"]:
        """Rows written with k coefficients each."""
        baseline = self.baseline_for(k)
        return baseline.decode_sparse(baseline.sparse_code(x.to(baseline.device, torch.float32), k))

    def metrics(self, name: str = SINGLE) -> dict[str, Any]:
        """What goes into metrics.json, beside the scores of the dictionary of that name."""
        if name not in self._at or not self._fits:
            return {}
        k = self._at[name]
        fit = self._fit_for(k)
        extra = {
            "n_latents": fit.baseline.n_latents,
            "k": k,
            "fit_s": round(fit.fit_s, 2),
            "stability": fit.stability,
            "fvu_by_components": self._curve,
        }
        return {"baselines": {self.name: self._scores[k]._asdict() | extra}}

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: SparseAutoencoderModule) -> None:
        """Fits the baseline, and its curve over the number of components."""
        data, device = _datamodule(trainer), pl_module.device
        if self._fits:  # they came with the checkpoint
            for fit in self._fits.values():
                fit.baseline.to(device)
            return
        group = Group.of_training(device)
        self.prepare(pl_module)
        curve_at = [data.d_model // part for part in (8, 4, 2)] if self._curve_at is None else self._curve_at
        numbers = sorted({max(1, r) for r in curve_at})
        total = len(self._l0s) * self._seeds + len(numbers)
        hidden = not trainer.is_global_zero
        with tqdm(total=total, desc=f"fit {self.name}", leave=False, disable=hidden) as bar:

            def fit(n_components: int | None, seed: int = 0, l0: int | None = None) -> tuple[Baseline, float]:
                wanted = Wanted(data.d_model, n_components, seed, l0)
                found = self._fit(data, wanted, device, group)
                bar.update()
                return found

            for l0 in self._l0s:
                (baseline, seconds), *others = [
                    fit(self._n_components, seed, l0) for seed in range(self._seeds)
                ]
                found = [share_found_again(baseline.directions, other.directions) for other, _ in others]
                self._fits[l0] = _Fit(baseline, seconds, sum(found) / len(found) if found else None)
            shown = next(iter(self._fits.values())).baseline
            for baseline in (shown, *(fit(r)[0] for r in numbers)):
                self._curve[str(baseline.n_latents)] = _score(baseline, data, None, group).fvu

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
                self._scores[k] = _score(self.baseline_for(k), _datamodule(trainer), k, group)
        if self._logged_at == trainer.global_step:  # the test after the last validation
            return
        self._logged_at = trainer.global_step
        for name, k in self._at.items():
            known = {key: value for key, value in self._scores[k]._asdict().items() if value is not None}
            points = {curve(f"baseline/{self.name}", name, key): value for key, value in known.items()}
            for logger in trainer.loggers:
                logger.log_metrics(points, trainer.global_step)

    def _fit(
        self, data: ActivationDataModule, wanted: Wanted, device: torch.device, group: Group = ALONE
    ) -> tuple[Baseline, float]:
        """A fitted baseline, and the seconds that it took, now or when it was fitted."""
        # With the run's seed, as the autoencoders: runs of several seeds say how much it matters.
        seed = (torch.initial_seed() + wanted.seed) % 2**31
        baseline = self.make(wanted._replace(seed=seed)).to(device)
        about = {
            "kind": type(baseline).__name__,
            "config": baseline.config,
            "revision": baseline.revision,
            "rows": self._max_rows,
            "hookpoint": data.hookpoint,
            "cache": hashlib.sha256(json.dumps(data.cache.manifest["shards"]).encode()).hexdigest(),
        }
        passing = data.cache.is_rolling or is_url(data.cache.location)
        folder = None if passing or not self._keep else Path(data.cache.location)
        found = None if folder is None else kept(folder, about)
        missing = group.any(found is None)  # on any rank: then all fit
        if found is not None and not missing:
            return found.baseline.to(device), found.fit_s
        begin = time.perf_counter()
        baseline.fit(_TrainRows(data, self._max_rows, device), data.moments, group)
        seconds = time.perf_counter() - begin
        if folder is not None and group.rank == 0:
            keep(baseline, folder, about, seconds)
        return baseline, seconds


def fitted_baselines(checkpoint: Mapping[str, Any]) -> dict[str, dict[int | None, Baseline]]:
    """Those in a run's checkpoint by name, and by the L0 learned for: None where learning knows none.

    Raises:
        InputError: if one is of an earlier revision of its kind that held other tensors.
    """
    states = [state for state in checkpoint["callbacks"].values() if "baseline" in state]
    return {
        state["baseline"]: {l0: _restored(saved) for l0, saved in state["fits"].items()} for state in states
    }


def nearest_l0(learned_for: Iterable[int | None], k: int) -> int | None:
    """Of several the one nearest to k; None, where learning knows none, is as near as can be."""
    return min(learned_for, key=lambda l0: abs((l0 or k) - k))


def _kind(saved: Mapping[str, Any]) -> type[Baseline]:
    return cast(type[Baseline], Dictionary.kinds[saved["kind"]])


def _revision(saved: Mapping[str, Any]) -> int:
    return saved.get("revision", 1)


def _restored(saved: Mapping[str, Any]) -> Baseline:
    baseline = _kind(saved)(**saved["config"])
    try:
        baseline.load_state_dict(saved["state"])
    except RuntimeError as error:  # missing tensors, or of another shape
        raise InputError(
            f"the checkpoint's {saved['kind']} is of revision {_revision(saved)}, this package's of "
            f"{baseline.revision}, which holds other tensors; run the same configuration with --fresh."
        ) from error
    return baseline


def check_names(callbacks: Iterable[object]) -> None:
    """Raises `InputError` where two baselines have one name, under which their scores would be kept."""
    names = [callback.name for callback in callbacks if isinstance(callback, BaselineCallback)]
    for name in names:
        if names.count(name) > 1:
            raise InputError(
                f"`trainer.callbacks` has {names.count(name)} baselines named {name}; list one of each, or in"
                " runs of their own."
            )


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
