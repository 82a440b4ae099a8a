"""What the dictionaries of a run are called: in its curves, its folder and its checkpoints."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from sae.dictionaries import SparseAutoencoder
from sae.errors import InputError

SINGLE = "dictionary"
"""What a run calls the only one that it trains; it shows in its checkpoints alone."""
Make = Callable[[int], SparseAutoencoder]
"""Builds a dictionary for a given d_model."""


def named(dictionary: Make | None, dictionaries: dict[str, Make] | None) -> dict[str, Make]:
    """What is to be trained, by name.

    Raises:
        InputError: unless exactly one of the two is given; for a name that is none.
    """
    check_given(dictionary, dictionaries)
    if dictionaries is None:
        assert dictionary is not None
        return {SINGLE: dictionary}
    if not dictionaries:
        raise InputError("`model.dictionaries` must have at least one name, got none; add one.")
    check_names(dictionaries)
    return dictionaries


def check_given(dictionary: Any, dictionaries: Any) -> None:
    """Raises `InputError` unless exactly one of the two options is there."""
    if (dictionary is None) == (dictionaries is None):
        given = "neither" if dictionary is None else "both"
        advice = (
            "give a configuration, e.g. --config quickstart.yaml"
            if dictionary is None
            else "set the other one to null"
        )
        raise InputError(
            "exactly one of `model.dictionary` and `model.dictionaries` (several by name) must be given, got"
            f" {given}; {advice}."
        )


def check_names(names: Iterable[str]) -> None:
    """Raises `InputError` for what cannot name a folder, a curve and a module of torch."""
    for name in names:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name):
            raise InputError(
                "names in `model.dictionaries` must be of letters, digits, - and _ (they become folders and"
                f" curves), got {name!r}; choose another."
            )
        if name == SINGLE or hasattr(nn.ModuleDict(), name):
            raise InputError(f"`model.dictionaries` has {name!r}, a name that is taken; choose another.")


def described(dictionaries: Mapping[str, SparseAutoencoder]) -> str:
    """What a checkpoint says of the dictionaries in it: their names, kinds and arguments."""
    found = [f"{name}={type(d).__name__}({d.extra_repr()})" for name, d in dictionaries.items()]
    return ", ".join(found).removeprefix(f"{SINGLE}=")


def check_described(found: str | None, dictionaries: Mapping[str, SparseAutoencoder]) -> None:
    """Raises `InputError` where a checkpoint says something else."""
    if found != (mine := described(dictionaries)):
        raise InputError(f"the checkpoint is of {found}, this run trains {mine}; start over with `--fresh`.")


def curve(stage: str, name: str, quantity: str = "") -> str:
    """A curve's name: `val/fvu` in a run of one dictionary, `val/<name>/fvu` in a run of several."""
    parts = [stage, "" if name == SINGLE else name, quantity]
    return "/".join(part for part in parts if part)


def metrics_of_each(metrics: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """metrics.json as each dictionary would have it in a run of its own; empty if it is."""
    if not metrics:
        return {}
    shared = {key: value for key, value in metrics.items() if key != "dictionaries"}
    if len(shared) == len(metrics):
        return {SINGLE: metrics}
    return {name: shared | own for name, own in metrics["dictionaries"].items()}
