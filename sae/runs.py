"""A run folder: starting, resuming, finishing it, and reading it afterwards."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from sae.activations.cache import ActivationCache
from sae.activations.cache.format import has_manifest
from sae.activations.cache.places import place_at
from sae.activations.contexts import cached_positions, token_ids_of
from sae.activations.datamodule import cache_folder
from sae.activations.language_model import language_model_of, weights_hash
from sae.activations.source import Source
from sae.activations.synthetic import WorldSource
from sae.checkpoints import newest_whole, read_checkpoint
from sae.dictionaries import Dictionary, load_dictionary
from sae.errors import InputError
from sae.inspection import Evidence, Reading, gather_evidence
from sae.inspection.evidence import MOST_TOKENS
from sae.inspection.report import check_report_folder
from sae.studies.l0_run import l0_of_run
from sae.training.names import SINGLE, metrics_of_each

OUTPUTS = (
    "config.yaml",
    "metrics.json",
    "progress.json",
    "l0_search.json",
    "evidence.safetensors",
    "checkpoints",
    "dictionary",
    "dictionaries",
    "before_divergence",
    "tensorboard",
    "report",
    "report.tmp",
    "report.old",
)
"""All that a run writes into its folder."""


def discard_run(folder: Path) -> None:
    """Removes what an earlier run wrote into the folder; a folder without a run is left as it is.

    Raises:
        InputError: if its `report` is not one of ours; nothing is removed then.
    """
    if not (folder / "config.yaml").is_file():
        return
    _check_reports(folder)
    for name in OUTPUTS:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _check_reports(folder: Path) -> None:
    """Raises `InputError` where the run's report, or one of its reports, is none of ours."""
    names, report = dictionary_names(read_config(folder)), folder / "report"
    if names == [SINGLE] or not report.is_dir():
        check_report_folder(report)
        return
    for path in report.iterdir():
        name = path.name.removesuffix(".tmp").removesuffix(".old")
        check_report_folder(report / name if name in names else report)


def report_folder(run: Run) -> Path:
    """Where a run's report is: `report`, or `report/<name>` in a run of several dictionaries."""
    return run.folder / "report" / (run.name or "")


def dictionary_names(config: dict[str, Any]) -> list[str]:
    """Names of what a run trains, by its configuration; one that is alone is called `dictionary`."""
    several = config["model"].get("dictionaries") if isinstance(config["model"], dict) else None
    return list(several) if isinstance(several, dict) and several else [SINGLE]


def _trained(folder: Path, names: list[str]) -> bool:
    """Whether the folder has all dictionaries that the run is to leave."""
    return all((dictionary_folder(folder, name) / "config.json").is_file() for name in names)


def dictionary_folder(folder: Path, name: str) -> Path:
    """Where a run leaves the dictionary of that name."""
    return folder / "dictionary" if name == SINGLE else folder / "dictionaries" / name


def checkpoint_to_resume(folder: Path, config: dict[str, Any]) -> Path | None:
    """The checkpoint that a run of `config` in this folder continues from; None if there is none.

    Raises:
        InputError: if the folder holds a run whose `model`, `data`, seed, precision or accumulation differ
            (the keys are named), or its checkpoints are torn.
    """
    if not (folder / "config.yaml").is_file():
        return None
    earlier = read_config(folder)
    compared = {key: (earlier.get(key), config.get(key)) for key in ("model", "data", "seed_everything")}
    for name in ("precision", "accumulate_grad_batches"):  # a longer run, other callbacks: these may change
        compared[f"trainer.{name}"] = earlier["trainer"].get(name), config["trainer"].get(name)
    differing = [key for name, pair in compared.items() for key in _differing(*pair, name)]
    if differing:
        raise InputError(
            f"{folder} holds a run with another configuration; it differs in {', '.join(differing)}. Give"
            " another `trainer.default_root_dir`, or `--fresh` to start over."
        )
    return newest_whole(folder / "checkpoints")


def is_finished(folder: Path, config: dict[str, Any]) -> bool:
    """Whether the folder holds a run that was trained as long as `config` says, and scored."""
    if not (folder / "config.yaml").is_file() or not _trained(folder, dictionary_names(config)):
        return False
    earlier, now = read_config(folder)["trainer"], config["trainer"]
    as_long = all(earlier.get(key) == now[key] for key in ("max_steps", "max_epochs", "max_time"))
    return as_long and bool(read_metrics(folder).get("finished"))


def read_metrics(folder: Path, name: str | None = None) -> dict[str, Any]:
    """metrics.json of a run; empty before its first validation.

    Args:
        folder: the run folder.
        name: in a run of several dictionaries, give what it would be if this one had been alone.
    """
    path = folder / "metrics.json"
    metrics = json.loads(path.read_text()) if path.is_file() else {}
    return metrics_of_each(metrics).get(name, {}) if name else metrics


def finished_metrics(folder: Path) -> dict[str, Any]:
    """metrics.json of a run that is finished.

    Raises:
        InputError: if it is not.
    """
    metrics = read_metrics(folder)
    if not metrics.get("finished"):
        raise InputError(f"{folder} holds no finished run; train it to its end first.")
    return metrics


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
    """A run that has been trained, or is on its way, and one of its dictionaries."""

    folder: Path
    dictionary: Dictionary
    hookpoint: str
    model: str | None
    """None where the cache's rows were imported."""
    cache: ActivationCache
    unfinished: str | None
    """Where an unfinished run stands, in a sentence; None for a finished one."""
    name: str | None = None
    """Of the dictionary, in a run of several; None where it is the only one."""

    def evidence(self, max_tokens: int | None = None) -> Evidence:
        """What its latents fire on: read from evidence.safetensors, or gathered and kept there.

        Args:
            max_tokens: rows read at most; None = as many as `gather_evidence` takes by itself.
        """
        folder = dictionary_folder(self.folder, self.name) if self.name else self.folder
        path = folder / "evidence.safetensors"
        about = {
            "dictionary": weights_hash(self.dictionary),
            "cache": self.cache.manifest.get("fingerprint"),
            "hookpoint": self.hookpoint,
            "max_tokens": max_tokens or MOST_TOKENS,
        }
        found = Evidence.load(path, about)
        if found is None:
            found = gather_evidence(self.dictionary, self.cache, self.hookpoint, max_tokens or MOST_TOKENS)
            try:
                folder.mkdir(parents=True, exist_ok=True)
                found.save(path, about)
            except OSError as error:
                print(f"evidence was not kept, it will be gathered again: {error}", file=sys.stderr)
        return found

    def reading(self, model: str | None = None, max_tokens: int | None = None) -> Reading:
        """The evidence for its latents; loads the language model for its tokenizer and unembedding.

        Args:
            model: folder or id of the language model, where it is not where the cache was made from;
                its weights must be the same.
            max_tokens: as for `evidence`.

        Raises:
            InputError: if there is no language model, it cannot be loaded here, or it does not match.
        """
        try:
            language_model = language_model_of(self.cache.manifest, self.dictionary.device, model)
        except InputError as error:
            if model is not None or self.model is None:
                raise
            raise InputError(
                f"the language model of {self.folder}, {self.model}, is not at hand; if it has moved, give"
                f" --model FOLDER to scripts/inspect_features.py. ({error})"
            ) from error
        token_ids, cached = token_ids_of(self.cache), cached_positions(self.cache)
        evidence = self.evidence(max_tokens)
        return Reading(self.dictionary, self.hookpoint, evidence, token_ids, language_model, cached)


def open_run(folder: str | Path, device: str | None = None, dictionary: str | None = None) -> Run:
    """Opens a run: a trained one, or what an unfinished one has at its last checkpoint.

    Args:
        folder: the run folder.
        device: where its dictionary and its language model go; None = a GPU where there is one.
        dictionary: name of one, in a run of several.

    Raises:
        InputError: if the folder holds none, `dictionary` is missing or not one of its names, no
            checkpoint was reached yet, or its cache is gone.
    """
    folder = Path(folder)
    config = read_config(folder)
    name = _chosen(folder, dictionary_names(config), dictionary)
    data = config["data"]
    try:
        source = Source(**data["source"]) if data.get("source") else None
    except (TypeError, AttributeError) as error:
        raise _not_ours(folder, "data.source", error) from error
    world = WorldSource(**data["world"]) if data.get("world") else None
    at = cache_folder(data.get("cache"), source, world)
    if not has_manifest(place_at(at)):
        raise InputError(
            f"the cache {at} of this run is gone; make it again with `python scripts/cache_activations.py"
            f" --config {folder / 'config.yaml'}`."
        )
    cache = ActivationCache(at)
    hookpoint = data.get("hookpoint") or cache.hookpoints[0]
    found, unfinished = _dictionary_of(folder, name, config, cache.d_model(hookpoint))
    if found.d_model != cache.d_model(hookpoint):
        raise InputError(
            f"the dictionary in {folder} has d_model={found.d_model}, the cache {at} has"
            f" {cache.d_model(hookpoint)} at {hookpoint}; they are not of one run."
        )
    found.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    of = None if name == SINGLE else name
    return Run(folder, found, hookpoint, cache.manifest["model"], cache, unfinished, of)


def _chosen(folder: Path, names: list[str], asked: str | None) -> str:
    """The name that was asked for, or the only one."""
    if names == [SINGLE] and asked is None:
        return SINGLE
    if names == [SINGLE]:
        raise InputError(f"{folder} has one dictionary, without a name; leave `--dictionary {asked}` out.")
    if asked not in names:
        got = "none" if asked is None else repr(asked)
        raise InputError(f"`--dictionary` must be one of {', '.join(names)} for {folder}, got {got}.")
    return asked


def _dictionary_of(
    folder: Path, name: str, config: dict[str, Any], d_model: int
) -> tuple[Dictionary, str | None]:
    """A run's dictionary, and where the run stands if it is unfinished."""
    trained, saved = _trained(folder, dictionary_names(config)), dictionary_folder(folder, name)
    if read_metrics(folder).get("finished") and trained:
        return load_dictionary(saved), None
    if trained and newest_whole(folder / "checkpoints") is None:
        return (
            load_dictionary(saved),
            "This run is unfinished: its dictionary was trained, but not yet scored.",
        )
    found, step = _dictionary_of_checkpoint(folder, name, config, d_model)
    return found, f"This run is unfinished: what follows is its checkpoint at step {step:,}."


def _dictionary_of_checkpoint(
    folder: Path, name: str, config: dict[str, Any], d_model: int
) -> tuple[Dictionary, int]:
    """A dictionary of an unfinished run as of its last checkpoint, and the step of that."""
    path = newest_whole(folder / "checkpoints")
    if path is None:
        raise InputError(
            f"{folder} has no dictionary yet, and no checkpoint: it stopped before its first validation; run"
            " the same train.py command again."
        )
    checkpoint = read_checkpoint(path)
    try:
        model = config["model"]
        described = model["dictionary"] if name == SINGLE else model["dictionaries"][name]
        kind = Dictionary.kinds[described["class_path"].rpartition(".")[2]]
        dictionary = kind(d_model, **described["init_args"] | l0_of_run(folder, config["model"], kind))
    except (KeyError, TypeError, AttributeError) as error:
        raise _not_ours(folder, "model.dictionary", error) from error
    prefix = f"learners.{name}.dictionary."
    state = {k.removeprefix(prefix): v for k, v in checkpoint["state_dict"].items() if k.startswith(prefix)}
    dictionary.load_state_dict(state)
    return dictionary.eval().requires_grad_(False), int(checkpoint["global_step"])


def _not_ours(folder: Path, key: str, error: Exception) -> InputError:
    return InputError(
        f"{folder / 'config.yaml'}: `{key}` is not what a run of this version writes ({error})."
    )
