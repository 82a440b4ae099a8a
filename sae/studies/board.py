"""The board: kinds and baselines trained on a world whose features are known, and scored against them."""

from __future__ import annotations

import hashlib
import json
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lightning
import torch
from torch import Tensor

from sae.activations.synthetic import PlantedRows, World, WorldStream
from sae.activations.synthetic.config import preset
from sae.baselines import NMF, PCA
from sae.callbacks import Checkpoints
from sae.checkpoints import WholeCheckpoints, newest_whole
from sae.dictionaries import Dictionary, Refined, load_dictionary, save_dictionary
from sae.errors import InputError
from sae.files import write_json
from sae.ops.sparse import SparseLatents
from sae.ops.truth import TruthMetrics, TruthScores
from sae.ops.truth_rows import random_directions, reference_scores, scores_of
from sae.studies.entries import FITTED, FROZEN, RANDOM, REFERENCES, Entry
from sae.training import SparseAutoencoderModule
from sae.training.trainer_settings import hush_lightning

_SCORED_AT_ONCE = 4096
_FIT_ROWS = 100_000
"""Rows that NMF is fitted on."""


@dataclass(frozen=True)
class Board:
    """Settings that all rows of a board share."""

    world: str
    samples: int = 2_000_000
    """Rows that each dictionary is trained on."""
    n_latents: int | None = None
    """Width of every dictionary; None = as many as there are features."""
    l0: float | None = None
    """Latents per row on average; None = that of the world."""
    batch_size: int = 1024
    held_out_rows: int = 20_000
    """Rows that all are scored on."""

    def check(self) -> None:
        """Raises `InputError` for values out of range."""
        preset(self.world)
        for name in ("samples", "batch_size", "held_out_rows"):
            if getattr(self, name) < 1:
                raise InputError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.samples < self.batch_size:
            raise InputError(
                f"`samples` must be at least the batch of {self.batch_size}, got {self.samples}."
            )
        n = preset(self.world).n_features if self.n_latents is None else self.n_latents
        if n < 1:
            raise InputError(f"`n_latents` must be at least 1, got {n}.")
        if self.l0 is not None and not 0 < self.l0 <= n:
            raise InputError(f"`l0` must be in (0, n_latents={n}], got {self.l0}.")


class BoardRunner:
    """Trains and scores one entry after the other; what is done is kept, what was interrupted goes on."""

    def __init__(self, board: Board, folder: Path, device: str = "cpu") -> None:
        board.check()
        self.board, self.folder, self.device = board, folder, _usable(device)
        self.world = World(preset(board.world))
        self.n_latents = board.n_latents or self.world.config.n_features
        self.l0 = board.l0 or self.world.mean_l0

    def result(self, entry: Entry, seed: int) -> dict[str, Any]:
        """The scores of an entry, from its file if that was made with the same settings."""
        told = {"board": asdict(self.board), "world": self.world.config.identity(), "entry": entry._asdict()}
        settings = hashlib.sha256(json.dumps([told, seed], sort_keys=True).encode()).hexdigest()[:16]
        safe = entry.name.replace(" ", "_").replace(":", "-").replace(">", "_by_")
        path = self.folder / "results" / f"{safe}-seed{seed}.json"
        if path.is_file():
            found = json.loads(path.read_text())
            if found["settings"] == settings:
                return found
        trained = self.folder / "trained" / f"{safe.partition('_by_')[0]}-seed{seed}"
        before = self._training_seconds(trained, entry, seed)
        begin = time.monotonic()
        scores = self._scores(entry, seed, trained)
        found = {
            "entry": entry.name,
            "seed": seed,
            "settings": settings,
            "seconds": round(before + time.monotonic() - begin, 1),
            "scores": scores._asdict(),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, found)
        return found

    def _scores(self, entry: Entry, seed: int, folder: Path) -> TruthScores:
        world, features = self.world, self.world.directions.to(self.device)
        if entry.kind in REFERENCES:
            atoms = random_directions(self.n_latents, features.shape[1], seed).to(self.device)
            atoms = atoms if entry.kind == RANDOM else features
            parents = world.parents.to(self.device)
            return reference_scores(self._held_out(), atoms, features, world.bias.to(self.device), parents)
        is_fitted = entry.kind in FITTED
        dictionary = self._fit(entry.kind) if is_fitted else self._train(entry, seed, folder)
        metrics = TruthMetrics(dictionary.directions.detach(), features, world.parents)
        encode: Callable[[Tensor], SparseLatents] = dictionary.encode_sparse
        if isinstance(dictionary, (PCA, NMF)):
            encode = partial(dictionary.sparse_code, k=max(1, round(self.l0)))
        return scores_of(self._held_out(), metrics, encode, dictionary.decode_sparse)

    def _held_out(self) -> Iterator[PlantedRows]:
        n = self.board.held_out_rows
        for begin in range(0, n, _SCORED_AT_ONCE):
            yield self.world.rows(begin, min(n, begin + _SCORED_AT_ONCE), self.device)

    def _fit(self, name: str) -> Dictionary:
        stream = WorldStream(self.world, self.board.batch_size)
        if name == "PCA":
            return PCA(stream.d_model).fit([], stream.moments).to(self.device)
        rows = self.world.rows(0, min(_FIT_ROWS, self.board.samples), stream=2).x
        return NMF(stream.d_model, stream.d_model).fit([rows], stream.moments).to(self.device)

    def _train(self, entry: Entry, seed: int, folder: Path) -> Dictionary:
        done = folder / "dictionary"
        if (done / "config.json").is_file() and self._is_of_these_settings(folder, entry, seed):
            dictionary = load_dictionary(done).to(self.device)
        else:
            begin = time.monotonic()
            dictionary = self._fit_by_gradients(entry, seed, folder)
            write_json(folder / "seconds.json", round(time.monotonic() - begin, 1))
            save_dictionary(dictionary, done, hookpoint=f"world:{self.board.world}")
        return dictionary if entry.refined_by is None else self._refined(dictionary, entry.refined_by)

    def _refined(self, dictionary: Dictionary, method: str) -> Refined:
        """At the board's L0: as many latents a row, or the penalty that leaves so many."""
        refined = Refined.of(dictionary, method, k=max(1, round(self.l0))).to(self.device)
        if method == "fista":
            n = min(_SCORED_AT_ONCE, self.board.samples)
            refined.set_penalty(self.world.rows(0, n, self.device, stream=2).x)
        return refined

    def _training_seconds(self, folder: Path, entry: Entry, seed: int) -> float:
        """What a training took that is done, for another entry or before an interruption; else 0."""
        path = folder / "seconds.json"
        if not (entry.is_trained and path.is_file() and self._is_of_these_settings(folder, entry, seed)):
            return 0.0
        return float(json.loads(path.read_text()))

    def _told(self, entry: Entry, seed: int) -> dict[str, Any]:
        """What a training depends on."""
        told = {"board": asdict(self.board), "world": self.world.config.identity(), "seed": seed}
        del told["board"]["held_out_rows"]
        return {**told, "kind": entry.kind, "revival": None if entry.revival is None else list(entry.revival)}

    def _is_of_these_settings(self, folder: Path, entry: Entry, seed: int) -> bool:
        path = folder / "settings.json"
        return path.is_file() and json.loads(path.read_text()) == self._told(entry, seed)

    def _fit_by_gradients(self, entry: Entry, seed: int, folder: Path) -> Dictionary:
        """A run of train.py's module on rows drawn as it goes; continued if it was interrupted."""
        checkpoints = folder / "checkpoints"
        if not self._is_of_these_settings(folder, entry, seed):
            # What other settings left must not be taken for a part of this, should this be interrupted.
            (folder / "settings.json").unlink(missing_ok=True)
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            write_json(folder / "settings.json", self._told(entry, seed))
        going_on = newest_whole(checkpoints)
        hush_lightning()
        lightning.seed_everything(seed, verbose=False)
        revival = None if entry.revival is None else list(entry.revival)
        control = "decoder" if entry.kind == FROZEN else None
        module = SparseAutoencoderModule(
            entry.make(self.l0, self.n_latents), revival=revival, controls=control
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Lightning's advice on workers and loggers
            trainer = lightning.Trainer(
                max_steps=self.board.samples // self.board.batch_size,
                accelerator=self.device.type,
                devices=1 if self.device.index is None else [self.device.index],
                logger=False,
                callbacks=[Checkpoints(checkpoints, every=500)],
                plugins=[WholeCheckpoints()],
                gradient_clip_val=1.0,
                num_sanity_val_steps=0,
                limit_val_batches=0,
                enable_progress_bar=False,
                enable_model_summary=False,
                default_root_dir=str(folder),
            )
            data = WorldStream(self.world, self.board.batch_size)
            trainer.fit(module, datamodule=data, ckpt_path=going_on, weights_only=True)
        return module.dictionary.to(self.device).eval().requires_grad_(False)


def _usable(device: str) -> torch.device:
    """The device, tried out; `InputError` where there is none of that name."""
    try:
        found = torch.device(device)
        torch.zeros(1, device=found)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(f"`device` {device!r} cannot be used: {reason}") from error
    return torch.device("cpu") if found.type == "cpu" else found
