"""Choosing L0 from the data: small dictionaries of several L0 and seeds, and what they have in common."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from sae.dictionaries import BatchTopK, SparseAutoencoder
from sae.errors import InputError
from sae.studies.l0_choice import Candidate, L0Choice, decide
from sae.studies.reproducible import agreement, decoder_projection, mean_cosine, shared_firings
from sae.training.learner import Learner
from sae.training.recipe import Recipe
from sae.training.schedules import learning_rate_for, warmup_then_decay
from sae.training.target_l0 import most_l0

WIDEST = 1024
"""Latents of the dictionaries that are trained to choose, where the run's own would be wider."""
HELD_OUT = 512
"""Rows, the last ones, that are compared on and not trained on."""
LONG = 100_000
FASTER = 2.5
"""Times the learning rate of a run of `LONG` steps: what the choice was tried with."""
_RECIPE = Recipe(revival=("auxk",), l0_start=1.0)


def probe(d_model: int, n_latents: int) -> Callable[[float], SparseAutoencoder]:
    """What `choose_l0` trains unless told otherwise: BatchTopK, of at most `WIDEST` latents.

    Its L0 is exact from the first step and may be a fraction, so a short run suffices; a kind with a penalty
    would spend that run finding its coefficient. The L0 is a property of the data and the width.
    """
    return lambda l0: BatchTopK(d_model, min(n_latents, WIDEST), l0)


def choose_l0(
    make: Callable[[float], SparseAutoencoder],
    rows: Float[Tensor, "rows d_model"],
    *,
    candidates: Sequence[float] | None = None,
    seeds: int = 2,
    steps: int = 600,
    batch_size: int = 512,
    progress: bool = False,
) -> L0Choice:
    """Trains short runs at several L0, and chooses the number of latents a row that other seeds find again.

    At every candidate, `seeds` dictionaries are trained on the same batches in the same order. Each pair of
    seeds then codes held-out rows by pursuit with 1, 2, ... latents, and the latents that both take are
    counted (`shared_firings`): the count grows by nearly one with each that the data have, and by much
    less beyond. The L0 of the training hardly matters for where that is; the candidate at which most is
    shared gives the value, and all that share nearly as much the band (`decide`).

    Args:
        make: a new dictionary of a given L0; its weights are drawn from torch's generator.
        rows: rows in raw units, well mixed; the last 512 (or a fifth, if that is less) are held out.
        candidates: L0s to train at, increasing; None = 1, 2, 4, ... up to a quarter of the latents.
        seeds: dictionaries per candidate, at least 2.
        steps: optimiser steps of each.
        batch_size: rows per step.
        progress: shows a bar.

    Raises:
        InputError: for an argument out of range, or too few rows.

    References:
        Sparse but Wrong: Incorrect L0 Leads to Incorrect Features in Sparse Autoencoders, Chanin and
        Garriga-Alonso 2025, arXiv 2508.16560: the proxies in the table. They do not decide (see `decide`).
    """
    with torch.device("meta"):
        n_latents = make(1.0).n_latents
    grid = _grid(n_latents) if candidates is None else [float(l0) for l0 in candidates]
    _check(grid, seeds, steps, batch_size, n_latents)
    held_out = min(HELD_OUT, len(rows) // 5)
    if held_out < 16 or not bool(rows.isfinite().all()):
        raise InputError(f"`rows` must be at least 80 and finite, got shape {tuple(rows.shape)}.")
    train_rows, test_rows = rows[:-held_out], rows[-held_out:]
    most = min(
        n_latents // 2,
        max(1, rows.shape[1] // 2),
        max(4, round(grid[-1] if candidates is None else 2 * grid[-1])),
    )
    table = []
    with torch.random.fork_rng(devices=[]), tqdm(total=len(grid) * seeds, disable=not progress) as bar:
        bar.set_description("choosing L0")
        for l0 in grid:
            trained = []
            for seed in range(seeds):
                torch.manual_seed(seed)
                trained.append(train(make(l0).to(rows.device), train_rows, steps, batch_size))
                bar.update()
            table.append(_compare(l0, trained, test_rows, most))
    return decide(tuple(table))


def _check(grid: list[float], seeds: int, steps: int, batch_size: int, n_latents: int) -> None:
    for name, value, least in (("seeds", seeds, 2), ("steps", steps, 1), ("batch_size", batch_size, 1)):
        if value < least:
            raise InputError(f"`{name}` must be at least {least}, got {value}.")
    if n_latents < 8:
        raise InputError(f"`n_latents` must be at least 8 for an L0 to be chosen, got {n_latents}.")
    rising = all(a < b for a, b in itertools.pairwise(grid))
    if not (grid and rising and grid[0] > 0 and grid[-1] <= n_latents):
        raise InputError(f"`candidates` must increase within (0, n_latents={n_latents}], got {grid}.")


def _grid(n_latents: int) -> list[float]:
    """1, 2, 4, ... as far as an L0 is looked at."""
    grid, most = [1.0], most_l0(n_latents)
    while 2 * grid[-1] <= most:
        grid.append(2 * grid[-1])
    return grid


def _compare(l0: float, trained: list[SparseAutoencoder], x: Tensor, most: int) -> Candidate:
    """The table's row of the dictionaries of one L0."""
    pairs = list(itertools.combinations(trained, 2))
    with torch.no_grad():
        projections = [
            decoder_projection(d.normalise(x), d.b_dec, d.directions, min(most, d.n_latents // 2))
            for d in trained
        ]
        return Candidate(
            l0=l0,
            projection=statistics.fmean(projections),
            projection_se=statistics.stdev(projections) / len(projections) ** 0.5,
            mean_cosine=statistics.fmean(mean_cosine(d.directions) for d in trained),
            agreement=statistics.fmean(agreement(a.directions, b.directions) for a, b in pairs),
            shared=tuple(tuple(shared_firings(x, a, b, most).tolist()) for a, b in pairs),
        )


def train(
    dictionary: SparseAutoencoder, rows: Float[Tensor, "rows d_model"], steps: int, batch_size: int
) -> SparseAutoencoder:
    """A short run at one L0 throughout; the batches are the same in every call."""
    dictionary.set_input_statistics(rows.mean(0), float(rows.square().sum(1).mean()))
    learner = Learner(dictionary, _RECIPE).to(rows.device)
    learner.plan(steps, batch_size)
    if dictionary.begins_with_rows:
        dictionary.begin(dictionary.normalise(rows[:16_384]))
    lr = FASTER * learning_rate_for(dictionary.n_latents, LONG)
    optimizer = torch.optim.Adam(dictionary.parameters(), lr=lr, fused=True)
    order = torch.Generator().manual_seed(0)
    for step in range(steps):
        factor = warmup_then_decay(step, warmup_steps=min(50, steps // 4), max_steps=steps, decay_share=0.2)
        optimizer.param_groups[0]["lr"] = lr * factor
        chosen = torch.randint(len(rows), (batch_size,), generator=order).to(rows.device)
        losses = learner.loss(dictionary.normalise(rows[chosen]), step)
        optimizer.zero_grad(set_to_none=True)
        losses.total.backward()
        learner.arrive(step)
        torch.nn.utils.clip_grad_norm_(dictionary.parameters(), 1.0)
        optimizer.step()
        learner.settle(step, optimizer)
    return dictionary.requires_grad_(False)
