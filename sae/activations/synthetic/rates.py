"""How often each feature of a world fires, and which feature is under which."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float64, Int64
from torch import Tensor

from sae.activations.synthetic.config import WorldConfig
from sae.errors import InputError

_BISECTIONS = 60


class Forest(NamedTuple):
    """The trees of a world: features 0 to n_trees - 1 are the roots, and each level follows on the last."""

    parents: Int64[Tensor, " n_features"]
    """Parent of each feature; -1 for roots and for features outside the trees."""
    levels: list[tuple[int, int]]
    """First feature of each level and the one after its last."""


def plant_forest(config: WorldConfig) -> Forest:
    """The trees: node j of a level hangs under node j // branching of the level above."""
    parents = torch.full((config.n_features,), -1)
    levels = [(0, config.n_trees)]
    for _ in range(config.depth if config.n_trees else 0):
        begin, end = levels[-1]
        size = (end - begin) * config.branching
        parents[end : end + size] = torch.arange(begin, end).repeat_interleave(config.branching)
        levels.append((end, end + size))
    return Forest(parents, levels)


def firing_rates(config: WorldConfig, forest: Forest) -> Float64[Tensor, " n_features"]:
    """The share of rows on which each feature fires, exactly: what is asked, so far as the trees allow.

    Asked is rate(r) = min_rate + (max_rate - min_rate) (r^-a - n^-a) / (1 - n^-a) for ranks r = 1 to n.
    Siblings exclude each other and fire only with their parent, so their rates can add up to the parent's
    at most: where they add up to more than `child_share` of it, they are lowered by one factor, and the
    next level is held against the lowered rates. Nothing else is lost: a child is drawn with its rate
    over its parent's, which makes up for its silence on other rows.

    Raises:
        InputError: if no largest rate gives the mean L0 that is asked.
    """
    if config.mean_l0 is None:
        assert config.max_rate is not None
        return _with_max_rate(config, forest, config.max_rate)
    low, high = config.min_rate, 1.0
    least, most = (float(_with_max_rate(config, forest, rate).sum()) for rate in (low, high))
    if not least <= config.mean_l0 <= most:
        raise InputError(
            f"`mean_l0` must lie in [{least:.3g}, {most:.3g}] for these features and trees, got"
            f" {config.mean_l0}; change it, `min_rate` or `zipf_exponent`."
        )
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        below = float(_with_max_rate(config, forest, middle).sum()) < config.mean_l0
        low, high = (middle, high) if below else (low, middle)
    return _with_max_rate(config, forest, high)


def _with_max_rate(config: WorldConfig, forest: Forest, max_rate: float) -> Tensor:
    ranks = torch.arange(1, config.n_features + 1, dtype=torch.float64)
    curve = ranks**-config.zipf_exponent
    span = float(curve[0] - curve[-1])
    share = (curve - curve[-1]) / span if span > 0 else torch.ones_like(curve)
    rates = config.min_rate + (max_rate - config.min_rate) * share
    for begin, end in forest.levels[1:]:
        asked = rates[begin:end].view(-1, config.branching)
        allowed = config.child_share * rates[forest.parents[begin : end : config.branching]]
        rates[begin:end] = (asked * (allowed / asked.sum(1)).clamp_max(1.0)[:, None]).flatten()
    return rates
