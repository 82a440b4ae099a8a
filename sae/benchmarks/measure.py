"""What is said of a training step: its rate, what it is next to others, its memory, where its time goes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sae.benchmarks.cases import Case
from sae.benchmarks.peak import peak_bytes
from sae.benchmarks.peers import installed
from sae.benchmarks.stages import shares
from sae.benchmarks.steps import Dense, Encoder, Floor, Ours, WithoutKernels, on_batches
from sae.benchmarks.timing import Times, in_turn, ratio, synchronise
from sae.dictionaries import Dictionary, SparseAutoencoder
from sae.dictionaries.penalised import Penalised
from sae.training.recipe import Recipe

Figures = dict[str, Any]


def of_case(case: Case, rounds: int, compiled: bool = True, peers: bool = True) -> Figures:
    """Rates of all contenders, ours over each, the peak of memory and the stages of ours."""
    ours = Ours(case)
    steps: dict[str, Callable[[Tensor], object]] = {"ours": ours, "floor": Floor(case), "dense": Dense(case)}
    steps |= {"encoder alone": Encoder(case), "ours without kernels": WithoutKernels(case)}
    if compiled:
        steps["dense, compiled"] = Dense(case, compiled=True)
    if peers:
        steps |= dict(installed(case))
    times = in_turn({name: on_batches(step, case) for name, step in steps.items()}, rounds, case.device)
    if case.device != "cpu":
        times["floor"] = [t + _optimiser_and_reading(case) for t in times["floor"]]
    found = {name: _rate(times, name, case) for name in steps}
    for name in steps:
        found[name]["time over ours"] = ratio(times, name, "ours")
    del steps
    return {
        "case": str(case),
        "contenders": found,
        "peak over parameters, gradients and moments, in pre-activation matrices": _peak(case),
        "stages": shares(on_batches(ours, case), case.device),
    }


def of_kinds(case: Case, rounds: int) -> Figures:
    """The rate of every kind at one size, over TopK's, each with its own ways of revival and at its final L0.

    Latents of penalised kinds fire k a row.
    """
    steps = {}
    for name, kind in Dictionary.kinds.items():
        if not issubclass(kind, SparseAutoencoder):
            continue
        wanted = {"target_l0": float(case.k)} if issubclass(kind, Penalised) else {"k": case.k}
        torch.manual_seed(0)
        dictionary = kind(case.d_model, case.n_latents, **wanted)
        if dictionary.begins_with_rows:
            dictionary.begin(dictionary.normalise(case.batches(1)[0].cpu()))
        steps[name] = on_batches(Ours(case, dictionary, Recipe(l0_start=1.0)), case)
    times = in_turn(steps, rounds, case.device)
    return {name: _rate(times, name, case) | {"time over TopK": ratio(times, name, "TopK")} for name in steps}


def growth(case: Case, rounds: int) -> dict[str, float]:
    """How the time of a step grows with n_latents, k and d_model: slopes of log time in log size.

    A slope of 1 means in proportion. Each size is halved and doubled, the others kept.
    """
    slopes = {}
    for size in ("n_latents", "k", "d_model"):
        cases = {factor: case._replace(**{size: int(getattr(case, size) * factor)}) for factor in (0.5, 1, 2)}
        times = in_turn({str(f): on_batches(Ours(c), c) for f, c in cases.items()}, rounds, case.device)
        slopes[size] = math.log(ratio(times, "2", "0.5")["median"]) / math.log(4)
    return slopes


def _rate(times: Times, name: str, case: Case) -> Figures:
    seconds = sorted(times[name])[len(times[name]) // 2]
    return {"ms per step": 1e3 * seconds, "tokens per s": case.rows / seconds}


def _peak(case: Case) -> float:
    """Beyond what training holds anyway; 1 = a matrix of all pre-activations in the case's dtype."""
    ours = Ours(case)
    step = on_batches(ours, case)
    step()  # gradients and moments are there from here on
    held = sum(p.numel() * p.element_size() for p in ours.learner.dictionary.parameters())
    peak = peak_bytes(step, torch.device(case.device)) - held  # gradients are made in the step
    return peak / (case.rows * case.n_latents * case.torch_dtype.itemsize)


def _optimiser_and_reading(case: Case) -> float:
    """Seconds that Adam's traffic and one reading of the pre-activations take at the bandwidth of a copy."""
    data = torch.empty(2**28, dtype=torch.float32, device=case.device)
    times = in_turn({"copy": lambda: data[: 2**27].copy_(data[2**27 :])}, 5, case.device)
    synchronise(case.device)
    bandwidth = 2**30 / min(times["copy"])  # 2^29 bytes read, as many written
    parameters = 2 * case.d_model * case.n_latents
    return (28 * parameters + case.rows * case.n_latents * case.torch_dtype.itemsize) / bandwidth
