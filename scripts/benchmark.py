"""Measures the activation cache against what bounds it: a bare forward pass, a copy in memory.

    python scripts/benchmark.py
    python scripts/benchmark.py --model FOLDER --hookpoint resid.8 --device cuda --json cache.json

Every figure is a ratio of two things timed in turn in this process, with the median and the range of several
rounds: absolute times say little on a shared machine. Reading is measured warm, that is from the page cache.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sae.activations import ActivationCache, Source, import_rows
from sae.activations.cache.places import LocalPlace
from sae.activations.cache.writer import write_shards
from sae.activations.harvest_begun import begin_harvest
from sae.activations.loaders import RowsOf, TrainLoader
from sae.activations.ranks import ALONE
from sae.dictionaries import TopK
from sae.exits import exit_on_input_error

ROUNDS = 5


def main() -> None:
    """Runs all and prints a table."""
    arguments = _parser().parse_args()
    with tempfile.TemporaryDirectory(prefix="sae-benchmark-") as folder:
        found = harvest_figures(arguments, Path(folder)) | read_figures(arguments, Path(folder))
    for name, value in found.items():
        if isinstance(value, dict):
            print(f"{name:<58} {value['median']:8.3f}   {value['lowest']:.3f} to {value['highest']:.3f}")
        else:
            print(f"{name:<58} {value:8.3f}")
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=2) + "\n")


def harvest_figures(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Harvesting over the bare forward passes of the same batches."""
    source = Source(
        model=arguments.model,
        dataset=arguments.dataset,
        hookpoints=arguments.hookpoint,
        n_tokens=arguments.tokens,
        context_length=arguments.context_length,
    )
    place = LocalPlace(folder / "harvest")
    begun = begin_harvest(source, place, arguments.device, ALONE)
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
            _synchronise(arguments.device)

        def whole() -> None:
            write_shards(begun.writer, shards, ALONE, produce)

        ratios = _ratios(whole, bare, between=remove_shards)
    return {f"harvest over bare forward ({arguments.model}, {arguments.hookpoint})": ratios}


def read_figures(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Reading over copying the same bytes, and the wait for data in a training step."""
    d_model = arguments.d_model
    rows = arguments.bytes // (4 * d_model)
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

    def shuffled(workers: int) -> Callable[[], None]:
        loader = _loader(cache, d_model, workers)
        return lambda: [None for _ in loader] and None

    copy()
    begin = time.perf_counter()
    copy()
    rate = n_bytes / (time.perf_counter() - begin)
    return {
        "copy in memory, GB/s": rate / 1e9,
        "sequential read, rate over a copy": _ratios(copy, sequential),
        "shuffled batches of 2,048, rate over a copy (0 workers)": _ratios(copy, shuffled(0)),
        "shuffled batches of 2,048, rate over a copy (1 worker)": _ratios(copy, shuffled(1)),
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
    return _summary(shares)


def _ratios(
    numerator: Callable[[], None], denominator: Callable[[], None], between: Callable[[], None] | None = None
) -> dict[str, float]:
    """Time of one over time of the other, in turn; the first round warms up and is left out."""
    ratios = []
    for _ in range(ROUNDS + 1):
        times = []
        for call in (numerator, denominator):
            if between is not None:
                between()
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
        ratios.append(times[0] / times[1])
    return _summary(ratios[1:])


def _summary(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values)}


def _synchronise(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="demo", help="`demo`, a folder, or a Hugging Face id")
    parser.add_argument("--dataset", default="demo", help="text, as data.source.dataset")
    parser.add_argument("--hookpoint", nargs="+", default=["resid.2"])
    parser.add_argument("--tokens", type=int, default=100_000, help="to harvest")
    parser.add_argument("--context-length", type=int, default=128)
    parser.add_argument("--d-model", type=int, default=768, help="width of the rows that are read")
    parser.add_argument("--bytes", type=int, default=600_000_000, help="of the rows that are read")
    parser.add_argument("--device", default="cpu", help="of the language model")
    parser.add_argument("--json", help="also write the figures there")
    return parser


if __name__ == "__main__":
    sys.exit(exit_on_input_error(main))
