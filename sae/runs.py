"""A run folder: starting, resuming, finishing it, and reading it afterwards."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sae.activations.cache import ActivationCache
from sae.activations.datamodule import cache_folder, open_or_harvest
from sae.activations.harvest import Source
from sae.activations.language_model import load_language_model
from sae.dictionaries import Dictionary, load_dictionary
from sae.dictionaries.storage import read_dictionary_config
from sae.errors import InputError
from sae.inspection import Reading

OUTPUTS = ("config.yaml", "metrics.json", "checkpoints", "dictionary", "tensorboard", "report")
"""All that a run writes into its folder."""


def prepare_folder(folder: Path, config: dict[str, Any], fresh: bool) -> Path | None:
    """Readies a run folder and returns the checkpoint to resume from, if there is one.

    Raises:
        InputError: if the folder holds a run whose `model` or `data` differ (the keys are named).
    """
    if fresh:
        for name in OUTPUTS:
            path = folder / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    saved = folder / "config.yaml"
    if saved.is_file():
        earlier = yaml.safe_load(saved.read_text())
        differing = [
            key for group in ("model", "data") for key in _differing(earlier[group], config[group], group)
        ]
        if differing:
            raise InputError(
                f"{folder} holds a run with another configuration; it differs in {', '.join(differing)}. Give"
                " another `trainer.default_root_dir`, or `--fresh` to start over."
            )
    last = folder / "checkpoints" / "last.ckpt"
    return last if last.is_file() else None


def is_finished(folder: Path, max_steps: int) -> bool:
    """Whether the run in the folder has been trained for `max_steps` and scored."""
    path = folder / "metrics.json"
    if not path.is_file() or not (folder / "dictionary" / "config.json").is_file():
        return False
    metrics = json.loads(path.read_text())
    return bool(metrics.get("finished")) and metrics.get("steps", 0) >= max_steps


def _differing(earlier: Any, now: Any, key: str) -> list[str]:
    if isinstance(earlier, dict) and isinstance(now, dict):
        return [
            found
            for name in sorted({*earlier, *now})
            for found in _differing(earlier.get(name), now.get(name), f"{key}.{name}")
        ]
    return [] if earlier == now else [f"{key} (was {earlier!r}, now {now!r})"]


@dataclass
class Run:
    """A run that has been trained."""

    folder: Path
    dictionary: Dictionary
    hookpoint: str
    model: str | None
    """None where the cache's rows were imported."""
    cache: ActivationCache

    def reading(self) -> Reading:
        """The evidence for its latents; loads the language model for its tokenizer and unembedding.

        Raises:
            InputError: if there is no language model, or it cannot be loaded here.
        """
        if self.model is None:
            raise InputError(f"the rows of {self.cache.folder} were imported; no tokens belong to them.")
        return Reading(self.dictionary, self.cache, self.hookpoint, load_language_model(self.model))


def open_run(folder: str | Path) -> Run:
    """Opens a trained run.

    Raises:
        InputError: if the folder holds none, or its cache is gone.
    """
    folder = Path(folder)
    config_path = folder / "config.yaml"
    if not config_path.is_file():
        raise InputError(
            f"{folder} is not a run folder (it has no config.yaml); give trainer.default_root_dir."
        )
    data = yaml.safe_load(config_path.read_text())["data"]
    source = Source(**data["source"]) if data.get("source") else None
    dictionary = load_dictionary(folder)
    saved = read_dictionary_config(folder)
    cache = open_or_harvest(cache_folder(data.get("cache"), source), None)
    return Run(folder, dictionary, saved["hookpoint"], saved["model"], cache)


def summary(folder: Path) -> str:
    """The comparison table of a run: every method at the autoencoder's own L0."""
    metrics = json.loads((folder / "metrics.json").read_text())
    methods = {"SAE": metrics, **{name.upper(): row for name, row in metrics["baselines"].items()}}
    lines = ["held-out rows " + "".join(f"{title:>{width}}" for title, _, width, _ in _COLUMNS)]
    for name, row in methods.items():
        cells = [_cell(row[key], width, form) for _, key, width, form in _COLUMNS]
        lines.append(f"{name:<14}" + "".join(cells))
    rate = _cell(metrics["tokens_per_s"], 0, ",.0f")
    lines.append(
        f"{metrics['tokens_seen']:,} tokens seen in {metrics['steps']:,} steps, {rate} tokens/s,"
        f" {metrics['wall_s']:.0f} s in all"
    )
    return "\n".join(lines)


_COLUMNS = (  # title, key in metrics.json, width, format
    ("FVU", "fvu", 9, ".4f"),
    ("w/o pos. 0", "fvu_without_first_position", 12, ".4f"),
    ("median", "fvu_median", 9, ".4f"),
    ("L0", "l0", 8, ".2f"),
    ("dead", "dead_fraction", 8, ".1%"),
    ("cosine", "cosine", 8, ".4f"),
    ("directions", "n_latents", 12, ","),
)


def _cell(value: int | float | None, width: int, form: str) -> str:
    """A number at the right of its column, a dash where it has no meaning."""
    return f"{'-' if value is None else format(value, form):>{width}}"
