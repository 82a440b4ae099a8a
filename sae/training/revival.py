"""Bringing back latents that have stopped firing: four ways, one or several at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from sae.dictionaries import SparseAutoencoder
from sae.errors import InputError
from sae.ops.group import ALONE, Group
from sae.training.dead_latents import DeadLatents

Way = Literal["auxk", "pre_act", "resample", "minfire"]
WAYS: tuple[Way, ...] = ("auxk", "pre_act", "resample", "minfire")


def check_ways(ways: Sequence[str]) -> None:
    """Raises `InputError` for ways that do not exist, or are named twice."""
    for way in ways:
        if way not in WAYS or list(ways).count(way) > 1:
            raise InputError(
                f"`revival` must list different ones of {', '.join(WAYS)}, got {list(ways)}; [] is none."
            )


def whose_turn(
    step: int, planned: int, n_latents: int, budget: float, device: torch.device, share: float = 0.25
) -> Int[Tensor, " some"] | None:
    """MinFire: which latents are to fire once in the batch of a step; None towards the end of the run.

    Latents take turns in the order of their numbers, as many in a step as a share of the batch's budget
    allows. Each keeps the row where its pre-activation is largest, if that is positive; what is left of the
    budget goes to the largest of all. The last tenth of the run is without it.

    Args:
        step: optimiser steps done.
        planned: steps of the whole run.
        n_latents: size of the dictionary.
        budget: latents that may fire in the batch of all ranks.
        device: where the answer goes.
        share: of the budget that turns may take.
    """
    if step >= 0.9 * planned:
        return None
    size = min(n_latents, max(1, int(share * budget)))
    if size == n_latents:
        return torch.arange(n_latents, device=device)
    return (step * size + torch.arange(size, device=device)) % n_latents


@torch.no_grad()
def resample(
    dictionary: SparseAutoencoder,
    dead_latents: DeadLatents,
    after_tokens: int,
    residual: Float[Tensor, "rows d_model"],
    optimizer: torch.optim.Optimizer,
    seed: int,
    group: Group = ALONE,
) -> int:
    """Begins latents that have not fired for `after_tokens` anew along residuals of badly reconstructed rows.

    Returns how many.

    Rows are drawn without replacement, with probabilities in proportion to the square of their squared
    residual; where there are fewer than dead latents, some of these are left as they are. The optimiser's
    moments of these latents and their counters begin anew as well. All ranks draw
    the same from the rows of all, in an order that does not depend on who has which.

    References:
        Towards Monosemanticity, Bricken et al., Transformer Circuits 2023, appendix "neuron resampling".
    """
    dead = (dead_latents.tokens_since_fired >= after_tokens).nonzero().squeeze(1)
    everyones = group.gather_equal(residual).flatten(0, 1)
    energies = everyones.double().square().sum(1)
    order = energies.argsort(descending=True)[: int((energies > 0).sum())]
    generator = torch.Generator().manual_seed(seed)
    if len(dead) > len(order):
        dead = dead[torch.randperm(len(dead), generator=generator)[: len(order)].to(dead.device)]
    if len(dead) == 0:
        return 0
    weights = energies[order].cpu().square() + 1e-300
    drawn = torch.multinomial(weights, len(dead), generator=generator)
    directions = F.normalize(everyones[order[drawn.to(order.device)]], dim=1)
    dictionary.set_latents(dead, directions)
    for name, parameter in dictionary.named_parameters():
        if name != "b_dec" and parameter in optimizer.state:
            for moment in ("exp_avg", "exp_avg_sq"):
                optimizer.state[parameter][moment][dead] = 0.0
    dead_latents.forgive(dead)
    return len(dead)
