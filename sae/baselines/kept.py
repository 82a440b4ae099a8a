"""Fitted baselines kept in a folder, found again by what they were made of."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sae.baselines.base import Baseline
from sae.dictionaries.storage import load_dictionary, save_dictionary
from sae.errors import InputError
from sae.files import write_json

FOLDER = "baselines"
_ABOUT = "about.json"


class Kept(NamedTuple):
    """A fit from earlier."""

    baseline: Baseline
    fit_s: float
    """Seconds that it took."""


def keep(baseline: Baseline, folder: Path, about: Mapping[str, Any], fit_s: float) -> None:
    """Saves a fit under `folder`/baselines; says so and goes on where that cannot be written to.

    Args:
        baseline: fitted.
        folder: of the rows that it was fitted on.
        about: all that the fit depends on, JSON-serialisable: rows, kind, settings.
        fit_s: seconds that it took.
    """
    path = _path(folder, about)
    try:
        save_dictionary(baseline, path, hookpoint=about.get("hookpoint"))
        # Last: a folder with it has the rest.
        write_json(path / _ABOUT, {"about": dict(about), "fit_s": round(fit_s, 2)})
    except OSError as error:
        shutil.rmtree(path, ignore_errors=True)
        print(f"the fit of {type(baseline).__name__} was not kept: {error}", file=sys.stderr)


def kept(folder: Path, about: Mapping[str, Any]) -> Kept | None:
    """The fit that `keep` saved of the same; None if there is none.

    Raises:
        InputError: for one that says it is of something else, or does not match what it says.
    """
    path = _path(folder, about)
    if not (path / _ABOUT).is_file():
        return None
    again = f"remove {path}: it is fitted again."
    try:
        said = json.loads((path / _ABOUT).read_text())
    except json.JSONDecodeError as error:
        raise InputError(f"{path / _ABOUT} is not JSON ({error}); {again}") from error
    wanted = json.loads(json.dumps(dict(about)))
    if said.get("about") != wanted:
        differing = [key for key in wanted if said.get("about", {}).get(key) != wanted[key]]
        raise InputError(f"the baseline in {path} was fitted on another {', '.join(differing)}; {again}")
    baseline = load_dictionary(path)
    if not isinstance(baseline, Baseline):
        raise InputError(f"{path} holds a {type(baseline).__name__}, which is no baseline; {again}")
    return Kept(baseline, float(said["fit_s"]))


def _path(folder: Path, about: Mapping[str, Any]) -> Path:
    key = hashlib.sha256(json.dumps(dict(about), sort_keys=True).encode()).hexdigest()[:16]
    return folder / FOLDER / f"{about['kind']}-{key}"
