"""A run whose L0 is chosen from its data: once, before its first step, and kept in its folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning
import torch

from sae.activations import ActivationDataModule
from sae.dictionaries import Dictionary
from sae.errors import InputError
from sae.files import write_json
from sae.ops.group import Group
from sae.studies.l0_choice import L0Choice
from sae.studies.l0_search import WIDEST, choose_l0, probe
from sae.training import SparseAutoencoderModule
from sae.training.target_l0 import l0_argument

FILE = "l0_search.json"
ROWS = 65_536
"""Train rows that are looked at, at most; and at most `BYTES` of them."""
BYTES = 2**29


class ChooseL0(lightning.Callback):
    """With `model.target_l0: auto`, settles the L0 before the dictionary is built; else does nothing.

    The first rank reads it from l0_search.json in the run folder, where an earlier session left it, or
    searches and writes it there; the others are told. metrics.json has it as `l0_chosen`.
    """

    def __init__(self, folder: Path) -> None:
        """Describes it: `folder` is the run's."""
        self._path = folder / FILE
        self._choice: dict[str, Any] | None = None

    def setup(self, trainer: lightning.Trainer, pl_module: SparseAutoencoderModule, stage: str) -> None:
        """Tells the module the value.

        Raises:
            InputError: on all ranks, if the data are too few or the dictionary too small to choose.
        """
        if stage != "fit" or not pl_module.target_l0.is_open:
            return
        device = trainer.strategy.root_device
        found: dict[str, Any] | str
        try:
            # Every rank searches: a collective does not wait for as long as one of them would take.
            found = self._settle(trainer.datamodule, pl_module, device, trainer.is_global_zero)  # pyright: ignore
        except InputError as error:
            found = str(error)
        found = Group.of_training(device).objects(found)[0]  # pyright: ignore[reportAssignmentType]
        if isinstance(found, str):
            error = InputError(found)
            error.on_all_ranks = True
            raise error
        self._choice = found
        pl_module.target_l0.chosen = found["value"]

    def metrics(self, name: str) -> dict[str, Any]:
        """The value and its band, where they were chosen."""
        if self._choice is None:
            return {}
        return {"l0_chosen": {key: self._choice[key] for key in ("value", "low", "high", "at_the_edge")}}

    def _settle(
        self, data: ActivationDataModule, module: SparseAutoencoderModule, device: torch.device, first: bool
    ) -> dict[str, Any]:
        n_latents = min(module.target_l0.n_latents, WIDEST)
        about = {
            "cache": data.cache.manifest.get("fingerprint"),
            "hookpoint": data.hookpoint,
            "n_latents": n_latents,
        }
        kept = read_choice(self._path)
        if kept is not None and kept["about"] == about:
            return kept
        choice = choose_from(data, n_latents, device, progress=first)
        found = {"about": about, **choice.as_dict()}
        if not first:
            return found
        print(choice)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_json(self._path, found)
        return found


def choose_from(
    data: ActivationDataModule, n_latents: int, device: torch.device, progress: bool = True
) -> L0Choice:
    """`choose_l0` on the first rows of a cache; the datamodule has been set up."""
    x = data.first_rows(min(ROWS, BYTES // (4 * data.d_model)))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    return choose_l0(probe(data.d_model, n_latents), x[order].to(device), progress=progress)


def read_choice(path: Path) -> dict[str, Any] | None:
    """What l0_search.json says; None where there is none, or it cannot be read."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and {"about", "value", "low", "high"} <= set(found) else None


def l0_of_run(folder: Path, model: dict[str, Any], kind: type[Dictionary]) -> dict[str, Any]:
    """The argument that `model.target_l0` of a run's configuration gave to its dictionary, by name.

    Raises:
        KeyError: if it was to be chosen, and the folder does not say what was.
    """
    asked, name = model.get("target_l0"), l0_argument(kind)
    if asked is None or name is None:
        return {}
    if asked == "auto":
        found = read_choice(folder / FILE)
        if found is None:
            raise KeyError(FILE)
        asked = found["value"]
    return {name: asked}
