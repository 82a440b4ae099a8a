"""A training that has left the numbers: what is clipped before, and what is said then."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sae.errors import DivergedError, RunError
from sae.training.host_reading import Moment
from sae.training.names import SINGLE


def clip_gradients(parameters: list[nn.Parameter], bound: float | None, algorithm: str | None) -> Tensor:
    """Clips gradients in place, by their norm unless `algorithm` is "value"; returns their norm before."""
    if bound and algorithm != "value":
        return nn.utils.clip_grad_norm_(parameters, bound)
    norm = torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()
    if bound:
        nn.utils.clip_grad_value_(parameters, bound)
    return norm


def step_not_finite(
    name: str, moment: Moment, of_rows: bool, of_thresholds: bool, lr: float
) -> DivergedError:
    """The error for a step at which something is not finite: its rows, a threshold, else loss or gradient."""
    why = f"its rows are finite, so training diverged: lower `model.lr`, it was {lr:.3g}"
    if of_rows:
        why = (
            "that batch has rows that are not finite: look for damage in the cache with"
            " `scripts/cache_activations.py --verify`"
        )
    what = f"a threshold{_of(name)}" if of_thresholds else f"the loss{_of(name)} or its gradient"
    return DivergedError(
        f"{what} is not finite at step {moment.step + 1:,} (batch"
        f" {moment.batch:,} in the order of seed {torch.initial_seed()}, counted from 0); {why}."
    )


def scores_not_finite(name: str, fvu: float | None, step: int, lr: float) -> RunError:
    """The error for held-out scores that are not finite; the same on all ranks."""
    error = RunError(
        f"the held-out FVU{_of(name)} is {fvu} at step {step:,}: training diverged; lower `model.lr`, it was"
        f" {lr:.3g}."
    )
    error.on_all_ranks = True
    return error


def _of(name: str) -> str:
    return "" if name == SINGLE else f" of `{name}`"
