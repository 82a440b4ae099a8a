"""A run folder: starting, resuming, finishing it, and reading it afterwards."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sae.activations.cache import ActivationCache
from sae.activations.datamodule import cache_folder
from sae.activations.language_model import load_language_model, weights_hash
from sae.activations.source import Source
from sae.dictionaries import Dictionary, load_dictionary
from sae.dictionaries.storage import read_dictionary_config
from sae.errors import InputError
from sae.inspection import Reading

OUTPUTS = ("config.yaml", "metrics.json", "checkpoints", "dictionary", "tensorboard", "report")
"""All that a run writes into its folder."""


def discard_run(folder: Path) -> None:
    """Removes what an earlier run wrote into the folder; a folder without a run is left as it is."""
    if not (folder / "config.yaml").is_file():
        return
    for name in OUTPUTS:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def checkpoint_to_resume(folder: Path, config: dict[str, Any]) -> Path | None:
    """The checkpoint that a run of `config` in this folder continues from; None if there is none.

    Raises:
        InputError: if the folder holds a run whose `model` or `data` differ (the keys are named).
    """
    if not (folder / "config.yaml").is_file():
        return None
    earlier = read_config(folder)
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


def is_finished(folder: Path, config: dict[str, Any]) -> bool:
    """Whether the folder holds a run that was trained as long as `config` says, and scored."""
    path = folder / "metrics.json"
    if not path.is_file() or not (folder / "dictionary" / "config.json").is_file():
        return False
    earlier, now = read_config(folder)["trainer"], config["trainer"]
    as_long = all(earlier.get(key) == now[key] for key in ("max_steps", "max_epochs", "max_time"))
    return as_long and bool(json.loads(path.read_text()).get("finished"))


def read_config(folder: Path) -> dict[str, Any]:
    """The configuration that a run was started with.

    Raises:
        InputError: if there is none, or it is not one of ours.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise InputError(
            f"{folder} is not a run folder (it has no config.yaml); give a trainer.default_root_dir."
        )
    try:
        config = yaml.safe_load(path.read_text())
    except yaml.YAMLError as error:
        raise InputError(f"{path} cannot be read: {str(error).splitlines()[0]}.") from error
    if not isinstance(config, dict) or not {"model", "data", "trainer"} <= set(config):
        raise InputError(f"{path} is not the configuration of a run; name another trainer.default_root_dir.")
    return config


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
        language_model = load_language_model(self.model)
        if weights_hash(language_model.model) != self.cache.manifest["model_hash"]:
            raise InputError(
                f"the weights of {self.model} are not those that the cache {self.cache.folder} was made with;"
                " harvest it again."
            )
        return Reading(self.dictionary, self.cache, self.hookpoint, language_model)


def open_run(folder: str | Path) -> Run:
    """Opens a trained run.

    Raises:
        InputError: if the folder holds none, or its cache is gone.
    """
    folder = Path(folder)
    data = read_config(folder)["data"]
    source = Source(**data["source"]) if data.get("source") else None
    dictionary = load_dictionary(folder)
    saved = read_dictionary_config(folder)
    at = cache_folder(data.get("cache"), source)
    if not (at / "manifest.json").is_file():
        raise InputError(
            f"the cache {at} of this run is gone; make it again with `python scripts/cache_activations.py"
            f" --config {folder / 'config.yaml'}`."
        )
    cache = ActivationCache(at)
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
    if round(metrics["l0"]) >= metrics["d_model"] and metrics["baselines"]:
        lines.append("L0 is not below d_model: PCA is exact there, so the comparison says nothing.")
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
