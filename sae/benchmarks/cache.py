"""The activation cache against what bounds it: a bare forward pass, a copy in memory, a step in memory."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning
import torch

from sae.activations import ActivationCache, ActivationDataModule, Source, import_rows
from sae.activations.cache.places import LocalPlace
from sae.activations.cache.writer import write_shards
from sae.activations.harvest_begun import begin_harvest
from sae.activations.loaders import RowsOf, TrainLoader
from sae.activations.ranks import ALONE
from sae.benchmarks.cases import Case
from sae.benchmarks.steps import Ours, on_batches
from sae.benchmarks.timing import in_turn, ratio, summary, synchronise
from sae.dictionaries import TopK
from sae.training import SparseAutoencoderModule

ROUNDS = 5


def harvest_figures(source: Source, device: str, folder: Path) -> dict[str, Any]:
    """Harvesting over the bare forward passes of the same batches."""
    place = LocalPlace(folder / "harvest")
    begun = begin_harvest(source, place, device, ALONE)
    shards = begun.writer.plan.shards

    def remove_shards() -> None:
        for name in place.sizes():
            if name.startswith(("shard", "moments")):
                place.remove(name)

    with begun.producing() as produce:

        def bare() -> None:
            for shard in shards:
                for group in produce(shard.sequences):
                    del group
            synchronise(device)

        def whole() -> None:
            write_shards(begun.writer, shards, ALONE, produce)

        times = in_turn({"whole": whole, "bare": bare}, ROUNDS, device, 0.0, between=remove_shards)
    return {f"harvest over bare forward ({source.model}, {source.hookpoints})": ratio(times, "whole", "bare")}


def read_figures(d_model: int, n_bytes: int, folder: Path) -> dict[str, Any]:
    """Reading over copying the same bytes, and the wait for data in a training step."""
    rows = n_bytes // (4 * d_model)
    cache = import_rows(torch.randn(rows, d_model), folder / "read", held_out=0.01)
    n_bytes = cache.n_rows("train") * d_model * 4
    buffer = torch.empty(2048, d_model)
    plain = torch.randn(cache.n_rows("train"), d_model)
    copied = plain.clone()

    def copy() -> None:
        copied.copy_(plain)

    def sequential() -> None:
        for batch in cache.batches("train", "acts", 2048):
            buffer[: len(batch.x)].copy_(batch.x)

    def shuffled(workers: int) -> Callable[[], object]:
        loader = _loader(cache, d_model, workers)
        return lambda: sum(1 for _ in loader)

    reading = {
        "sequential read": sequential,
        "shuffled batches of 2,048 (0 workers)": shuffled(0),
        "shuffled batches of 2,048 (1 worker)": shuffled(1),
    }
    times = in_turn({"copy": copy, **reading}, ROUNDS, "cpu", 0.0)
    return {
        "copy in memory, GB/s": summary([n_bytes / seconds / 1e9 for seconds in times["copy"]]),
        **{f"{name}, rate over a copy": ratio(times, "copy", name) for name in reading},
        f"data wait, share of a step (d {d_model}, n 1,024, k 32)": _data_wait(cache, d_model),
    }


def _loader(cache: ActivationCache, d_model: int, workers: int) -> TrainLoader:
    rows = RowsOf("acts", d_model, torch.float32)
    return TrainLoader(cache.shards("train"), rows, 2048, 0, workers=workers)


def _data_wait(cache: ActivationCache, d_model: int) -> dict[str, float]:
    """Share of the wall time of forward, backward and Adam that is spent waiting for batches."""
    dictionary = TopK(d_model, n_latents=1024, k=32)
    optimiser = torch.optim.Adam(dictionary.parameters(), lr=1e-4)
    shares = []
    loader = _loader(cache, d_model, workers=1)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))  # pass after pass
    for _ in range(ROUNDS):
        waited, begin = 0.0, time.perf_counter()
        for step in range(31):
            asked = time.perf_counter()
            x = next(batches).x
            if step == 0:  # threads start and files are checked
                waited, begin = 0.0, time.perf_counter()
                continue
            waited += time.perf_counter() - asked
            x_hat, _ = dictionary(x)
            (x - x_hat).square().mean().backward()
            optimiser.step()
            optimiser.zero_grad()
        shares.append(waited / (time.perf_counter() - begin))
    return summary(shares)


def training_figures(case: Case, folder: Path, rounds: int = ROUNDS) -> dict[str, Any]:
    """The whole training from a cache on disk, Lightning and all, over the same steps on rows in memory."""
    cache = import_rows(torch.cat(case.batches(40)).cpu(), folder / "train", held_out=0.02)
    turns = _Turns(case, rounds)
    kind = "gpu" if case.device.startswith("cuda") else "cpu"
    trainer = lightning.Trainer(
        max_steps=turns.steps,
        accelerator=kind,
        devices=1,
        precision="bf16-mixed" if case.dtype == "bfloat16" else "32-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        limit_val_batches=0,
        gradient_clip_val=1.0,
        log_every_n_steps=10**9,
        callbacks=[turns],
        default_root_dir=folder,
    )
    module = SparseAutoencoderModule(lambda d_model: TopK(d_model, case.n_latents, case.k), revival=[])
    trainer.fit(module, datamodule=ActivationDataModule(str(cache.location), batch_size=case.rows))
    return {f"training from a cache, rate over steps in memory {case}": summary(turns.ratios)}


class _Turns(lightning.Callback):
    """After every few steps of a training as many in memory; the first of each warm up."""

    EACH = 10

    def __init__(self, case: Case, rounds: int) -> None:
        self.case, self.steps = case, self.EACH * (rounds + 1)
        self.ratios: list[float] = []
        self._in_memory = on_batches(Ours(case), case)
        self._since = 0.0

    def on_train_batch_end(self, trainer: lightning.Trainer, *_: Any) -> None:
        """Takes the time of the steps that were, and of those in memory."""
        if trainer.global_step % self.EACH:
            return
        synchronise(self.case.device)
        middle = time.perf_counter()
        for _ in range(self.EACH):
            self._in_memory()
        synchronise(self.case.device)
        end = time.perf_counter()
        if trainer.global_step > self.EACH:
            self.ratios.append((end - middle) / (middle - self._since))
        self._since = time.perf_counter()
