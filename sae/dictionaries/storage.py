"""Saving and loading dictionaries: config.json and weights.safetensors, no pickle."""

from __future__ import annotations

import json
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors_bytes
from torch import Tensor

from sae.dictionaries.base import Dictionary
from sae.errors import InputError
from sae.files import write_atomically, write_json

FORMAT = "sae-dictionary/1"
DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def save_dictionary(
    dictionary: Dictionary, folder: str | Path, *, hookpoint: str | None = None, model: str | None = None
) -> None:
    """Writes `config.json` and `weights.safetensors`, each under a temporary name and then renamed.

    Args:
        dictionary: what to save; its tensors are saved in raw activation units with unit directions.
        folder: made if missing; an earlier dictionary in it is replaced.
        hookpoint: where its inputs come from, e.g. `resid.12`.
        model: the language model behind it.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().cpu().contiguous() for name, t in dictionary.saved_tensors().items()}
    config = {
        "format": FORMAT,
        "kind": type(dictionary).__name__,
        **dictionary.config,
        "hookpoint": hookpoint,
        "model": model,
        "dtype": str(dictionary.directions.dtype).removeprefix("torch."),
        "inference": dictionary.inference,
        "saved_form": "raw x, no pre-bias: pre_acts = x @ W_enc + b_enc; x_hat = latents @ W_dec + b_dec",
    }
    # Config last: a folder with a config has its weights.
    write_atomically(folder / "weights.safetensors", to_safetensors_bytes(tensors))
    write_json(folder / "config.json", config)


def load_dictionary(folder: str | Path) -> Dictionary:
    """Loads what `save_dictionary` wrote, for use: in evaluation mode and without gradients.

    Args:
        folder: a run folder or the `dictionary` folder inside it.

    Raises:
        InputError: if the folder holds no dictionary, or one that this version cannot read.
    """
    folder = _dictionary_folder(Path(folder))
    config = read_dictionary_config(folder)
    kind = Dictionary.kinds.get(config["kind"])
    if kind is None:
        raise InputError(
            f"{folder} holds a dictionary of kind {config['kind']!r}, this version knows"
            f" {', '.join(sorted(Dictionary.kinds))}; install the version of `sae` that wrote it."
        )
    arguments = {name: config[name] for name in signature(kind).parameters if name in config}
    tensors = read_dictionary_tensors(folder)
    try:
        dictionary = kind(**arguments).to(DTYPES[config["dtype"]])
        dictionary.load_saved_tensors(tensors)
    except (KeyError, RuntimeError, TypeError) as error:
        raise InputError(f"the dictionary in {folder} does not match its config.json: {error}") from error
    return dictionary.eval().requires_grad_(False)


def read_dictionary_config(folder: str | Path) -> dict[str, Any]:
    """The config.json of a saved dictionary.

    Raises:
        InputError: if there is none, or its format is not ours.
    """
    path = _dictionary_folder(Path(folder)) / "config.json"
    try:
        config = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not JSON ({error}); the dictionary was damaged.") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT or "kind" not in config:
        found = config.get("format") if isinstance(config, dict) else None
        raise InputError(f"{path} has format {found!r}, expected {FORMAT!r}; is it another tool's file?")
    return config


def read_dictionary_tensors(folder: str | Path) -> dict[str, Tensor]:
    """The weights of a saved dictionary, in the saved form.

    Raises:
        InputError: if they cannot be read.
    """
    path = _dictionary_folder(Path(folder)) / "weights.safetensors"
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path} does not match its config.json: {error}") from error


def _dictionary_folder(folder: Path) -> Path:
    for candidate in (folder / "dictionary", folder):
        if (candidate / "config.json").is_file():
            return candidate
    raise InputError(
        f"no dictionary in {folder} (no config.json there or in dictionary/); has the run finished?"
    )
