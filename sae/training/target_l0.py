"""The L0 that is asked of a dictionary beside its own arguments: a number, or one chosen from the data."""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Mapping
from typing import Any, Literal

from sae.dictionaries import Dictionary, SparseAutoencoder
from sae.errors import InputError
from sae.training.names import Make

AskedL0 = int | float | Literal["auto"] | None
MOST = 128
"""The largest L0 that is looked at."""


def most_l0(n_latents: int) -> int:
    """The largest L0 that is looked at for a dictionary: a quarter of its latents, at most 128."""
    return max(1, min(MOST, n_latents // 4))


def l0_argument(kind: type[Dictionary]) -> str | None:
    """The name of the kind's argument that sets L0: `k` or `target_l0`; None where it has neither."""
    parameters = inspect.signature(kind).parameters
    return next((name for name in ("k", "target_l0") if name in parameters), None)


class TargetL0:
    """What `model.target_l0` says, and the value that it comes to.

    A number goes to the kind's `k` or `target_l0`, whichever it has. With `auto` the value is not known
    before the data have been looked at (`sae.studies.l0_run`); until `chosen` is set, the dictionary is
    built at the largest L0 that could be chosen, so that a plan is on the safe side.
    """

    def __init__(self, asked: AskedL0 = None) -> None:
        self.asked = asked
        self.chosen: int | float | None = None if asked == "auto" else asked
        self.n_latents = 0
        """Of the dictionary; 0 where nothing is asked."""

    @property
    def is_open(self) -> bool:
        """Whether a value is still to be chosen from the data."""
        return self.asked is not None and self.chosen is None

    @property
    def note(self) -> str:
        """For a plan that does not know the value."""
        return (
            f"L0 is chosen from the data when the run begins (`model.target_l0`: auto); planned at"
            f" {most_l0(self.n_latents)}, the largest it can be, and without the choice's own time."
        )

    def filled(self, make: Make) -> Make:
        """`make` with the L0 filled in; `make` itself where none is asked for beside its arguments.

        Raises:
            InputError: if the kind has no such argument, it is given already, or a fixed coefficient is.
        """
        if self.asked is None:
            return make
        kind, given = _described(make)
        name = self._checked_argument(kind, given)
        self.n_latents = int(given["n_latents"])

        def built(d_model: int) -> SparseAutoencoder:
            value = most_l0(self.n_latents) if self.chosen is None else self.chosen
            return make(d_model, **{name: value})  # pyright: ignore[reportCallIssue]

        return built

    def filled_all(self, makes: Mapping[str, Make]) -> dict[str, Make]:
        """The same for several by name.

        Raises:
            InputError: also for `auto` with several: each has an L0 of its own.
        """
        if self.asked == "auto" and len(makes) > 1:
            raise InputError(
                "`model.target_l0`: auto is for one dictionary; give each of several its own L0."
            )
        return {name: self.filled(make) for name, make in makes.items()}

    def _checked_argument(self, kind: type[SparseAutoencoder], given: dict[str, Any]) -> str:
        """The name of the kind's argument that the value goes to."""
        name, asked = l0_argument(kind), f"target_l0={self.asked}"
        if name is None:
            raise InputError(
                f"`model.target_l0` must be null for {kind.__name__}, whose L0 cannot be set, got {asked}."
            )
        if given.get(name) is not None:
            raise InputError(
                f"`model.target_l0` must be null where the dictionary's `{name}` is given, got {asked} and"
                f" {name}={given[name]}; leave one of the two out."
            )
        coefficient = given.get("sparsity_coefficient")
        if coefficient is not None and given.get("penalty") != "quadratic":
            raise InputError(
                "`model.target_l0` must be null where `sparsity_coefficient` is fixed, since L0 follows from"
                f" it, got {asked} and sparsity_coefficient={coefficient}; leave one of the two out."
            )
        takes = typing.get_args(typing.get_type_hints(kind.__init__)[name])
        if float not in takes and isinstance(self.asked, float):
            raise InputError(f"`model.target_l0` must be a whole number for {kind.__name__}, got {asked}.")
        return name


def _described(make: Make) -> tuple[type[SparseAutoencoder], dict[str, Any]]:
    """The kind that `make` builds, and the arguments it is to have beside d_model."""
    if isinstance(make, functools.partial):
        for found in (make.func, *make.args):
            if inspect.isclass(found) and issubclass(found, SparseAutoencoder):
                return found, dict(make.keywords)
    raise InputError(
        "`target_l0` must come with a dictionary whose kind can be seen, functools.partial(Kind,"
        f" n_latents=...), got {make!r}."
    )
