"""What a world is made of, and the worlds that have a name."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from typing import Any

from sae.errors import InputError


@dataclass(frozen=True)
class WorldConfig:
    """A world of sparse features; `World` says how its rows come about."""

    n_features: int = 256
    """Features, most frequent first (before the trees take their share)."""
    d_model: int = 64
    """Width of the rows."""
    zipf_exponent: float = 0.5
    """The r-th feature's firing rate falls as r to this power, from the largest rate to `min_rate`."""
    max_rate: float | None = None
    """Share of rows on which the most frequent feature fires; null = whatever gives `mean_l0`."""
    min_rate: float = 0.004
    """Share of rows on which the rarest feature fires."""
    mean_l0: float | None = 3.0
    """Features that fire per row on average, trees included; null = what `max_rate` gives."""
    n_trees: int = 8
    """Trees of features; 0 = all features are on their own."""
    branching: int = 3
    """Children of each node above the leaves; at most one of them fires."""
    depth: int = 2
    """Levels below the root."""
    child_share: float = 0.9
    """At most this share of a parent's firings has a child; rates of children that would ask for more are
    lowered."""
    correlation_rank: int = 4
    """Factors that features share; 0 = they fire independently."""
    correlation_scale: float = 0.15
    """Standard deviation of the loadings on each factor."""
    magnitude_max: float = 5.0
    """Mean magnitude of the most frequent feature."""
    magnitude_min: float = 4.0
    """Mean magnitude of the rarest; those between lie on a line."""
    magnitude_std: float = 0.5
    """A feature's own spread is |N(magnitude_std, magnitude_std)|: features differ in it."""
    bias: float = 0.5
    """Norm of the vector that is added to every row."""
    noise: float = 0.05
    """Standard deviation of the Gaussian noise on every coordinate."""
    max_cosine: float | None = 0.4
    """Directions are pushed apart until no |cos| exceeds this; null = random directions."""
    seed: int = 0
    """Of everything: directions, loadings, magnitudes and rows."""

    def check(self) -> None:
        """Raises `InputError` for values out of range, or that contradict each other."""
        nodes, asked_twice = self.tree_nodes, self.max_rate is not None and self.mean_l0 is not None
        asked = self.max_rate is not None or self.mean_l0 is not None
        top = 1.0 if self.max_rate is None else self.max_rate
        shared = self.correlation_rank * self.correlation_scale**2
        for name, rule, good in (
            ("n_features", "at least 1", self.n_features >= 1),
            ("d_model", "at least 1", self.d_model >= 1),
            ("zipf_exponent", "positive", self.zipf_exponent > 0),
            ("min_rate", "in (0, 1)", 0 < self.min_rate < 1),
            ("max_rate", f"in [min_rate={self.min_rate}, 1]", self.min_rate <= top <= 1),
            ("n_trees", "at least 0", self.n_trees >= 0),
            ("branching", "at least 1", self.branching >= 1),
            ("depth", "at least 0", self.depth >= 0),
            ("child_share", "in (0, 1]", 0 < self.child_share <= 1),
            ("correlation_rank", "at least 0", self.correlation_rank >= 0),
            ("magnitude_min", "positive", self.magnitude_min > 0),
            ("magnitude_max", "positive", self.magnitude_max > 0),
            ("magnitude_std", "at least 0", self.magnitude_std >= 0),
            ("bias", "at least 0", self.bias >= 0),
            ("noise", "at least 0", self.noise >= 0),
            ("max_cosine", "in (0, 1]", self.max_cosine is None or 0 < self.max_cosine <= 1),
            ("seed", "at least 0", self.seed >= 0),
        ):
            if not good:
                raise InputError(f"`{name}` must be {rule}, got {name}={getattr(self, name)}.")
        if asked_twice or not asked:
            raise InputError(
                f"`max_rate` or `mean_l0` must be given, and not both: got max_rate={self.max_rate},"
                f" mean_l0={self.mean_l0}."
            )
        if nodes > self.n_features:
            raise InputError(
                f"`n_trees`={self.n_trees} with branching {self.branching} and depth {self.depth} take"
                f" {nodes:,} features, there are {self.n_features:,}; lower it, or raise `n_features`."
            )
        if shared > 0.9:
            raise InputError(
                f"`correlation_scale`={self.correlation_scale} with {self.correlation_rank} factors makes"
                f" them {shared:.2f} of a feature's variance; at most 0.9 is possible, lower it."
            )

    @property
    def tree_nodes(self) -> int:
        """Features in trees."""
        return self.n_trees * sum(self.branching**level for level in range(self.depth + 1))

    def identity(self) -> dict[str, Any]:
        """All that the rows depend on, as JSON."""
        return asdict(self)


PRESETS = {
    "tiny": WorldConfig(),
    "small": WorldConfig(
        n_features=1024,
        d_model=128,
        min_rate=0.001,
        mean_l0=6.0,
        n_trees=16,
        branching=3,
        depth=3,
        correlation_rank=8,
        correlation_scale=0.1,
        max_cosine=0.35,
    ),
    "synthsaebench-16k": WorldConfig(
        n_features=16_384,
        d_model=768,
        max_rate=0.4,
        min_rate=5e-4,
        mean_l0=None,
        n_trees=128,
        branching=4,
        depth=3,
        child_share=0.97,
        correlation_rank=25,
        correlation_scale=0.1,
        noise=0.0,
        max_cosine=None,
    ),
}
"""Worlds by name. The last one has the settings of SynthSAEBench-16k v2 (children scaled by the parent), not
its very directions and rows; which features make a tree is not published in numbers, so here the trees hold
the most frequent ones, level by level.

References:
    SynthSAEBench: Evaluating Sparse Autoencoders on Scalable Realistic Synthetic Data, Chanin and
    Garriga-Alonso 2026, arXiv 2602.14687.
"""


@dataclass(frozen=True)
class WorldSource:
    """A cache made of a world's rows: the `data.world` group of a configuration."""

    name: str = "small"
    """One of tiny, small, synthsaebench-16k."""
    n_rows: int = 400_000
    """Rows to cache over both splits."""
    held_out: float = 0.05
    """Share of the rows held out for evaluation: the last ones."""
    seed: int = 0
    """Of the world: another one has other directions and other rows."""

    def config(self) -> WorldConfig:
        """The world that is meant.

        Raises:
            InputError: if there is none of that name.
        """
        return replace(preset(self.name), seed=self.seed)

    def folder_name(self) -> str:
        """E.g. `world-small-1a2b3c4d`."""
        told = json.dumps([self.config().identity(), self.n_rows, self.held_out], sort_keys=True)
        return f"world-{self.name}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"


def preset(name: str) -> WorldConfig:
    """The world of that name.

    Raises:
        InputError: if there is none; lists those there are.
    """
    if name not in PRESETS:
        raise InputError(f"`world` must be one of {', '.join(PRESETS)}, got {name!r}.")
    return PRESETS[name]
