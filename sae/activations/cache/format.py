"""The manifest of a cache, format "sae-activation-cache/1": reading and checking it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from sae.activations.cache.places import Place, place_at
from sae.errors import InputError

FORMAT = "sae-activation-cache/1"
MANIFEST = "manifest.json"
SEQUENCES = "sequences.safetensors"
ORDER = "order.safetensors"
MOMENTS = "moments.safetensors"
Split = Literal["train", "held_out"]

AGAIN = "delete the folder and make the cache again"
MAKE_MISSING = "delete this file and run the command that made the cache again: it makes what is missing"


def read_manifest(location: str | Path | Place) -> dict[str, Any]:
    """The manifest of a cache, finished or not.

    Raises:
        InputError: if there is none, it is not of this format, or it names files that no cache has.
    """
    place = place_at(location)
    try:
        text = place.read(MANIFEST)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise InputError(f"{place} is not an activation cache (it has no {MANIFEST}).") from error
    path = f"{place}/{MANIFEST}"
    try:
        manifest = json.loads(text)
    except ValueError as error:
        raise InputError(f"{path} is not JSON ({error}); {AGAIN}.") from error
    _check_format(path, manifest)
    try:
        _check_entries(path, manifest)
    except (KeyError, TypeError) as error:
        raise InputError(f"{path} is incomplete ({error}); {AGAIN}.") from error
    return manifest


def has_manifest(place: Place) -> bool:
    """Whether a cache was begun there."""
    return place.size(MANIFEST) is not None


def is_whole(place: Place, manifest: Mapping[str, Any]) -> bool:
    """Whether all files of a manifest are there, as long as they were written."""
    sizes = place.sizes()
    return all(sizes.get(e["file"]) == e["bytes"] for e in [*manifest["files"], *manifest["shards"]])


def write_manifest(place: Place, manifest: Mapping[str, Any]) -> None:
    """Replaces the manifest, whole."""
    place.write(MANIFEST, [(json.dumps(manifest, indent=2, allow_nan=False) + "\n").encode()])


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for torch.float32."""
    return str(dtype).removeprefix("torch.")


def _check_format(path: str, manifest: Any) -> None:
    found = manifest.get("format") if isinstance(manifest, dict) else None
    if found == FORMAT:
        return
    name, _, version = str(found).rpartition("/")
    if name == FORMAT.rpartition("/")[0] and version.isdigit() and int(version) > int(FORMAT[-1]):
        raise InputError(
            f"{path} has format {found!r}, newer than the {FORMAT!r} that this version reads; upgrade sae."
        )
    raise InputError(f"{path} has format {found!r}, this version reads {FORMAT!r}.")


def _check_entries(path: str, manifest: Mapping[str, Any]) -> None:
    entries = [*manifest["shards"], *manifest["files"]]
    names = [entry["file"] for entry in entries]
    for name in names:
        if not isinstance(name, str) or Path(name).name != name or name == "..":
            raise InputError(f"{path} names the file {name!r}; all files lie in the cache's own folder.")
    for name in set(names):
        if names.count(name) > 1:
            raise InputError(f"{path} lists {name} twice; {AGAIN}.")
    for entry in entries:
        kind = entry["checksum"].partition(":")[0]
        if kind not in ("xxh3", "sha256"):
            raise InputError(f"{path} has a checksum of unknown kind {kind!r}; upgrade sae.")
        if not isinstance(entry["bytes"], int):
            raise TypeError(f"bytes of {entry['file']} are {entry['bytes']!r}")
    for shard in manifest["shards"]:
        if shard["split"] not in ("train", "held_out") or not isinstance(shard["rows"], int):
            raise TypeError(f"shard {shard['file']} is described as {dict(shard)!r}")
    for key in ("hookpoints", "d_model", "dtype"):
        manifest[key]
    if manifest.get("finished") or "rolling" in manifest:
        _check_rows(manifest)


def _check_rows(manifest: Mapping[str, Any]) -> None:
    """Raises TypeError or KeyError unless the rows of a cache to be read are described."""
    if not isinstance(getattr(torch, str(manifest["dtype"]), None), torch.dtype):
        raise TypeError(f"`dtype` is {manifest['dtype']!r}")
    for name in manifest["hookpoints"]:
        if not isinstance(manifest["d_model"][name], int):
            raise TypeError(f"`d_model` of {name} is {manifest['d_model'][name]!r}")
        manifest["statistics"][name]
    for split in ("train", "held_out"):
        manifest["splits"][split]
    for name in manifest.get("rolling", {"train": []})["train"]:
        if Path(name).name != name:
            raise TypeError(f"`rolling` names {name!r}")
