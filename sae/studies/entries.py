"""What stands on the board of known truth: kinds with a way of revival, baselines, and what chance has."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from sae.dictionaries import Dictionary, SparseAutoencoder
from sae.dictionaries.batch_topk import BatchTopK
from sae.dictionaries.penalised import Penalised
from sae.dictionaries.refined import METHODS
from sae.errors import InputError
from sae.training.revival import Way, check_ways

FITTED = ("PCA", "NMF")
FROZEN, RANDOM, TRUTH = "frozen decoder", "random directions", "true directions"
REFERENCES = (RANDOM, TRUTH)
"""On every board: what nothing has, and what the truth itself has with a pursuit's code."""


class Entry(NamedTuple):
    """A row of the board."""

    name: str
    """As asked for: `TopK`, `BatchTopK:auxk+minfire`, `TopK>omp`, `PCA`, `frozen decoder`."""
    kind: str
    """A kind of autoencoder, a baseline, or one of the references."""
    revival: tuple[Way, ...] | None = None
    """None = the kind's own."""
    refined_by: str | None = None
    """A pursuit that codes rows on the trained directions in place of the encoder."""

    @property
    def is_trained(self) -> bool:
        """Whether it takes a training run."""
        return self.kind not in (*FITTED, *REFERENCES)

    def make(self, l0: float, n_latents: int) -> Callable[[int], SparseAutoencoder]:
        """The kind at a mean L0; called with d_model."""
        kind = Dictionary.kinds["TopK" if self.kind == FROZEN else self.kind]
        assert issubclass(kind, SparseAutoencoder)
        # Those that choose row by row take whole numbers.
        asked = l0 if issubclass(kind, (Penalised, BatchTopK)) else max(1, round(l0))
        name = "target_l0" if issubclass(kind, Penalised) else "k"
        return partial(kind, n_latents=n_latents, **{name: asked})


def entry_named(name: str) -> Entry:
    """Reads the name of an entry.

    Raises:
        InputError: if there is no such kind, way of revival or pursuit.

    >>> entry_named("BatchTopK:auxk+minfire").revival
    ('auxk', 'minfire')
    """
    rest, refines, refined_by = name.partition(">")
    kind, revives, ways = rest.partition(":")
    trained = [k for k, c in Dictionary.kinds.items() if issubclass(c, SparseAutoencoder)]
    known = [*trained, *FITTED, FROZEN, *REFERENCES]
    if kind not in known or ((revives or refines) and kind not in (*trained, FROZEN)):
        raise InputError(
            f"`entries` must be among {', '.join(known)}, kinds also with :auxk+minfire (ways of revival) and"
            f" >omp (a pursuit in place of the encoder), got {name!r}."
        )
    if refines and refined_by not in METHODS:
        raise InputError(
            f"`entries`: there is no pursuit {refined_by!r}, as in {name!r}; there are {', '.join(METHODS)}."
        )
    revival = (() if ways == "none" else tuple(ways.split("+"))) if revives else None
    check_ways(revival or ())
    if kind == FROZEN and "resample" in (revival or ()):
        raise InputError(f"`entries`: {name!r} cannot resample: that would move directions that are frozen.")
    return Entry(name, kind, revival, refined_by or None)  # pyright: ignore[reportArgumentType]


ALL = (
    "TopK", "BatchTopK", "MatryoshkaBatchTopK", "JumpReLU", "Gated", "ReLU", "MatchingPursuit",
    "BatchTopK>omp", FROZEN, *FITTED,
)  # fmt: skip
"""What a board has unless told otherwise, references aside."""
