"""What a run takes of memory, disk, time and network, reckoned before any of it is paid for."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning
import torch

from sae.activations import ActivationDataModule
from sae.activations.cache.places import LocalPlace
from sae.activations.source import parse_bytes
from sae.callbacks import NMFBaseline
from sae.dictionaries import MatchingPursuit, MatryoshkaBatchTopK, SparseAutoencoder, TopK
from sae.dictionaries.penalised import Penalised
from sae.errors import InputError
from sae.files import format_bytes
from sae.planning.memory import Memory, Step, memory_of, revived_per_row
from sae.planning.rows import CachePlan, plan_cache
from sae.planning.speed import Work, ring_bytes
from sae.planning.table import plan_table
from sae.training import SparseAutoencoderModule
from sae.training.flops import training_flops
from sae.training.learner import RIDERS_BESIDE_LATENTS
from sae.training.trainer_settings import check_trainer

RUNTIME_BYTES = 10**9
"""Memory that no tensor shows: CUDA's context, libraries, workspaces, gaps between blocks."""
_RUNTIME = f"about {format_bytes(RUNTIME_BYTES)} for the runtime"


@dataclass(frozen=True)
class RunPlan:
    """A run, planned. `str` gives the text to print, `check` refuses what cannot fit."""

    dictionaries: dict[str, SparseAutoencoder]
    """By name, on the meta device: shapes without numbers."""
    each: tuple[Step, ...]
    """The step of each."""
    memory: Memory
    """Of all together."""
    cache: CachePlan
    gpus: int
    memory_limit: int | None
    """Bytes of one GPU, or of this machine where it trains on its processor; None = not known."""
    on_processor: bool
    """Whether the training would run on this machine's processor."""
    batch_size: int
    """Rows per step over all GPUs, an accumulated step's parts apart."""
    steps: int
    tokens: int
    """Rows that the training sees."""
    run_folder: LocalPlace
    work: Work
    batches_ahead: int
    """Batches that the loader keeps ready in the machine's memory."""

    @property
    def dictionary(self) -> SparseAutoencoder:
        """The first."""
        return next(iter(self.dictionaries.values()))

    @property
    def step(self) -> Step:
        """That of the first; rows, width and precision are those of all."""
        return self.each[0]

    @property
    def language_model_bytes(self) -> int:
        """Weights of the language model where it runs beside the training; else 0."""
        return self._model_bytes if self.cache.is_rolling else 0

    @property
    def total_memory(self) -> int:
        """Bytes on one GPU that tensors take at the peak."""
        return self.memory.total + self.language_model_bytes

    @property
    def gradient_bytes(self) -> int:
        """Bytes that GPUs sum among each other in each step; 0 for one GPU."""
        return self.memory.gradients if self.gpus > 1 else 0

    @property
    def sent_bytes(self) -> int:
        """Bytes that each GPU sends in each step."""
        return ring_bytes(self.gradient_bytes, self.gpus)

    @property
    def checkpoint_bytes(self) -> int:
        """Disk for the last, the previous and the best checkpoint, and for the dictionary."""
        return 3 * (self.memory.parameters + self.memory.moments) + self.memory.parameters

    @property
    def _model_bytes(self) -> int:
        model = self.cache.model
        return model.parameters * model.dtype.itemsize if model else 0

    def __str__(self) -> str:
        return plan_table(self)

    def check(self) -> None:
        """Raises `InputError` for the first thing that cannot fit: memory, then disk."""
        self._check_memory()
        self._check_disk()

    def _check_memory(self) -> None:
        limit = self.memory_limit
        if limit is None:
            return
        model, needed = self._model_bytes + RUNTIME_BYTES, self.total_memory + RUNTIME_BYTES
        if self._model_bytes and model > limit:
            raise InputError(
                f"`plan.memory` must hold the language model, {format_bytes(model)} with"
                f" {_RUNTIME}, got {format_bytes(limit)}; harvest on a larger GPU, or take a smaller"
                " `data.source.model`."
            )
        if needed > limit:
            raise InputError(
                f"`plan.memory` must be at least {format_bytes(needed)} ({_RUNTIME} included), got"
                f" {format_bytes(limit)}: {format_bytes(needed - limit)} too little; {self._advice(limit)}."
            )

    def _advice(self, limit: int) -> str:
        """Which single changes would make it fit, reckoned and not guessed."""
        rows = self.step.rows // 2
        while rows and not self._fits(limit, rows=rows, held_out_rows=rows):
            rows //= 2
        found = [f"`batch_size` {rows * self.gpus:,} fits"] if rows else []
        for gpus in (self.gpus * 2**power for power in range(1, 7)):
            rows, rest = divmod(self.batch_size, gpus)
            if not rest and self._fits(limit, rows=rows, held_out_rows=rows, holds_gradients=True):
                found.append(f"{gpus} GPUs fit")
                break
        if self._fits(limit, precision="bf16-mixed"):
            found.append("`trainer.precision` bf16-mixed fits")
        if self._fits(limit, nmf=False):
            found.append("it fits without the NMF baseline (--trainer.callbacks=PCABaseline)")
        weights = self.memory.parameters + self.memory.gradients + self.memory.moments
        return ", ".join(found) or (
            f"parameters, gradients and moments are {format_bytes(weights)} on every GPU, however many there"
            " are and however small the batch: lower `n_latents`"
        )

    def _fits(self, limit: int, **changes: Any) -> bool:
        """Whether it would, with these changes to the step."""
        changed = replace(self, memory=memory_of(*(replace(s, **changes) for s in self.each)))
        return changed.total_memory + RUNTIME_BYTES <= limit

    def _check_disk(self) -> None:
        cache, run, checkpoints = self.cache, self.run_folder, self.checkpoint_bytes
        coming, free = cache.bytes_to_come, cache.free_bytes
        same = isinstance(cache.place, LocalPlace) and _disk_of(cache.place.folder) == _disk_of(run.folder)
        needed = coming + (checkpoints if same else 0)
        if coming and free is not None and needed > free:
            also = f", beside {format_bytes(checkpoints)} of checkpoints" if same else ""
            raise InputError(
                f"the harvest needs {format_bytes(coming)} more in {cache.place}{also}:"
                f" {format_bytes(needed - free)} more than is free; lower `n_tokens`, choose a smaller"
                " `dtype` (int8), bound it with `disk`, or name another `cache` folder."
            )
        free = run.free_bytes()
        if free is not None and checkpoints > free:
            raise InputError(
                f"`trainer.default_root_dir` {run} needs {format_bytes(checkpoints)} for checkpoints,"
                f" {format_bytes(checkpoints - free)} more than is free; name a folder on another disk, or"
                " lower `n_latents`."
            )


def plan_run(
    module: SparseAutoencoderModule,
    data: ActivationDataModule,
    trainer: lightning.Trainer,
    gpus: int = 1,
    memory: str | int | None = None,
) -> RunPlan:
    """Reckons what `trainer.fit(module, datamodule=data)` takes, with the harvest before it.

    Nothing large is made: the dictionary has shapes only, and of a language model only the configuration is
    read, and only where the cache is not finished.

    Args:
        module: as configured, without a dictionary yet.
        data: as configured; its cache may be missing.
        trainer: gives precision, steps, accumulated batches, callbacks and the run folder.
        gpus: that share each batch.
        memory: of one GPU, e.g. `80GB`, or bytes; None = that of the present GPU, or without one and for one
            device that of this machine.

    Raises:
        InputError: if `gpus` does not divide the batch, or the cache can be neither opened nor reckoned.
    """
    if gpus < 1 or data.batch_size % gpus:
        raise InputError(
            f"`plan.gpus` must be at least 1 and divide `batch_size`={data.batch_size}, got {gpus};"
            " they share each batch equally: change one of the two."
        )
    limit, on_processor = _memory_limit(trainer, gpus, memory)
    cache = plan_cache(data)
    if cache.train_rows < data.batch_size:
        raise InputError(
            f"`batch_size`={data.batch_size:,} is more than the {cache.train_rows:,} train rows; lower it, or"
            " raise `n_tokens`."
        )
    with torch.device("meta"):
        dictionaries = module.build(cache.d_model)
    each = tuple(
        _step(module, name, d, data.batch_size, trainer, cache, gpus, on_processor)
        for name, d in dictionaries.items()
    )
    steps = _steps(trainer, cache.train_rows // data.batch_size)
    tokens = steps * data.batch_size * trainer.accumulate_grad_batches
    return RunPlan(
        dictionaries=dictionaries,
        each=each,
        memory=memory_of(*each),
        cache=cache,
        gpus=gpus,
        memory_limit=limit,
        on_processor=on_processor,
        batch_size=data.batch_size,
        steps=steps,
        tokens=tokens,
        run_folder=LocalPlace(Path(trainer.default_root_dir)),
        work=_work(trainer, cache, each, steps, tokens),
        batches_ahead=data.workers + 1 if data.workers else 0,
    )


def _step(
    module: SparseAutoencoderModule,
    name: str,
    dictionary: SparseAutoencoder,
    batch_size: int,
    trainer: lightning.Trainer,
    cache: CachePlan,
    gpus: int,
    on_processor: bool,
) -> Step:
    check_trainer(trainer)
    weights = [p.numel() for p in dictionary.parameters()]
    rows = batch_size // gpus
    ways = module.recipe.ways_for(dictionary)
    start = dictionary.W_dec.numel() if module.controls.of(name) == "soft_decoder" else 0
    return Step(
        rows=rows,
        held_out_rows=rows,
        d_model=dictionary.d_model,
        n_latents=dictionary.n_latents,
        entries=math.ceil(dictionary.entries_per_row * module.recipe.l0_start_for(dictionary)),
        revived=revived_per_row(dictionary.d_model, dictionary.n_latents) if "auxk" in ways else 0,
        weights=sum(weights),
        largest=max(weights),
        buffers=sum(b.numel() for b in dictionary.buffers()) + start,
        precision=str(trainer.precision),
        row_element=cache.row_dtype.itemsize,
        holds_gradients=gpus > 1 or trainer.accumulate_grad_batches > 1,
        shares=dictionary.n_latents + RIDERS_BESIDE_LATENTS + len(dictionary.news),
        penalised=isinstance(dictionary, Penalised),
        pursues=isinstance(dictionary, MatchingPursuit),
        chooses_in_rows=isinstance(dictionary, TopK),
        levels=len(dictionary.widths) if isinstance(dictionary, MatryoshkaBatchTopK) else 1,
        row_sparse=module.pace.row_sparse,
        averages=module.pace.ema_decay is not None,
        on_processor=on_processor,
        nmf=any(isinstance(callback, NMFBaseline) for callback in trainer.callbacks),  # pyright: ignore
    )


def _work(
    trainer: lightning.Trainer, cache: CachePlan, each: Sequence[Step], steps: int, tokens: int
) -> Work:
    flops = [training_flops(step.d_model, step.n_latents, step.entries, step.revived) for step in each]
    train, auxk = sum(of_one for of_one, _ in flops), sum(revival for _, revival in flops)
    model = cache.model
    precisions = {"bf16-mixed": torch.bfloat16, "64-true": torch.float64}
    return Work(
        harvest=2.0 * model.parameters_run * cache.tokens_to_run if model else 0.0,
        harvest_dtype=model.dtype if model else torch.float32,
        train=float(train * tokens),
        auxk=float(auxk * tokens),
        train_dtype=precisions.get(each[0].precision, torch.float32),
        batches=steps * trainer.accumulate_grad_batches,
    )


def _steps(trainer: lightning.Trainer, batches: int) -> int:
    """Optimiser steps until `max_steps` or `max_epochs` ends the run, whichever is first."""
    ends = []
    if trainer.max_steps != -1:
        ends.append(trainer.max_steps)
    if trainer.max_epochs not in (None, -1):
        ends.append(trainer.max_epochs * -(-max(1, batches) // trainer.accumulate_grad_batches))
    return min(ends)


def _memory_limit(trainer: lightning.Trainer, gpus: int, memory: str | int | None) -> tuple[int | None, bool]:
    """Bytes of one GPU as given, or as found here; and whether this machine's processor is meant."""
    device = trainer.strategy.root_device
    if memory is not None:
        return parse_bytes(str(memory), "plan.memory"), False
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory, False
    if gpus > 1:
        return None, False
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), True


def _disk_of(folder: Path) -> int:
    """The disk that a folder lies on, or will lie on."""
    existing = folder.absolute()
    while not existing.exists():
        existing = existing.parent
    return existing.stat().st_dev
