"""On rows of a world whose features are known: what each method has found of them, after the final test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import lightning
import torch
from torch import Tensor

from sae.activations import ActivationDataModule
from sae.activations.synthetic import CachedTruth, PlantedRows, cached_truth, is_of_a_world
from sae.callbacks.baselines import BaselineCallback
from sae.dictionaries import Dictionary
from sae.ops.sparse import SparseLatents
from sae.ops.truth import TruthMetrics, TruthScores, between
from sae.ops.truth_rows import random_directions, reference_scores, scores_of
from sae.training import SparseAutoencoderModule
from sae.training.names import SINGLE

MOST_ROWS = 20_000
"""Held-out rows that are scored, at most."""
CHANCE, TRUTH = "random directions", "true directions"


class AgainstTheTruth(lightning.Callback):
    """`TruthScores` of each dictionary and of the baselines at its L0, where the cache was made from a world.

    F1 and MCC also between chance (0) and the truth (1): random directions, as many as latents, and the true
    ones, both coded by a pursuit that is told how many fire. Where the truth is not known, nothing is done.
    """

    def __init__(self) -> None:
        self._scores: dict[str, dict[str, TruthScores]] = {}  # dictionary -> method -> scores
        self._references: dict[str, dict[str, TruthScores]] = {}

    def metrics(self, name: str = SINGLE) -> dict[str, Any]:
        """What goes into metrics.json, beside the scores of the dictionary of that name."""
        if name not in self._scores:
            return {}
        references = self._references[name]
        told = {
            method: _told(scores, references[CHANCE], references[TRUTH])
            for method, scores in (self._scores[name] | references).items()
        }
        own = told.pop(name)
        return {
            **own,
            "truth_references": {method: told.pop(method) for method in references},
            "baselines": told,
        }

    def on_test_end(self, trainer: lightning.Trainer, pl_module: SparseAutoencoderModule) -> None:
        """Scores. Every rank does all of it: the rows are few, and made the same anywhere."""
        data: ActivationDataModule = trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if not is_of_a_world(data.location):
            return
        rows = _Rows(cached_truth(data.location), pl_module.device)
        baselines = [c for c in trainer.callbacks if isinstance(c, BaselineCallback)]  # pyright: ignore
        for name, dictionary in pl_module.dictionaries.items():
            found = {name: rows.score(dictionary, dictionary.encode_sparse)}
            for callback in baselines:
                k = callback.k_for(name)
                baseline = callback.baseline_for(k)
                found[callback.name] = rows.score(baseline, partial(baseline.sparse_code, k=k))
            self._scores[name] = found
            self._references[name] = {
                CHANCE: rows.reference(random_directions(dictionary.n_latents, dictionary.d_model)),
                TRUTH: rows.reference(rows.features),
            }


class _Rows:
    """Held-out rows with their truth, on a device."""

    def __init__(self, truth: CachedTruth, device: torch.device) -> None:
        self._truth, self._device = truth, device
        world = truth.world
        self.features, self._parents, self._bias = (
            part.to(device) for part in (world.directions, world.parents, world.bias)
        )

    def __iter__(self) -> Iterator[PlantedRows]:
        left = MOST_ROWS
        for batch in self._truth.held_out():
            yield batch.to(self._device)
            left -= len(batch.x)
            if left <= 0:
                return

    def score(self, dictionary: Dictionary, encode: Callable[[Tensor], SparseLatents]) -> TruthScores:
        metrics = TruthMetrics(dictionary.directions.detach(), self.features, self._parents)
        return scores_of(self, metrics, encode, dictionary.decode_sparse)

    def reference(self, atoms: Tensor) -> TruthScores:
        return reference_scores(self, atoms.to(self.features), self.features, self._bias, self._parents)


def _told(scores: TruthScores, chance: TruthScores, truth: TruthScores) -> dict[str, Any]:
    normalised = {
        f"truth_{name}": between(getattr(scores, name), getattr(chance, name), getattr(truth, name))
        for name in ("f1", "mcc")
    }
    return {**normalised, "truth": scores._asdict()}
