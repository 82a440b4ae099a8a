"""Rows from elsewhere, written as an activation cache."""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from sae.activations.cache import FORMAT, ActivationCache, finish_cache, write_manifest, write_tensors
from sae.errors import InputError
from sae.ops.moments import StreamingMoments

ROWS_PER_SHARD = 2**18


def import_rows(
    x: Float[Tensor, "rows d_model"], folder: str | Path, *, hookpoint: str = "acts", held_out: float = 0.05
) -> ActivationCache:
    """Writes rows as a cache; the last ones are held out, the others are shuffled.

    Such a cache knows no tokens: rows have no sequence and no position.

    Raises:
        InputError: if the rows are not finite (naming the first), too few, or the folder is not empty.
    """
    folder = Path(folder)
    n_held_out = round(len(x) * held_out)
    if not 0 < n_held_out < len(x):
        raise InputError(f"`held_out`={held_out} leaves no rows on one side of {len(x)}; change it.")
    if folder.is_dir() and any(folder.iterdir()):
        raise InputError(f"{folder} is not empty; name a new folder for the imported rows.")
    bad = ~torch.isfinite(x).all(-1)
    if bad.any():
        raise InputError(f"row {int(bad.nonzero()[0])} is not finite ({int(bad.sum())} such rows in all).")
    folder.mkdir(parents=True, exist_ok=True)
    n_train = len(x) - n_held_out
    order = torch.randperm(n_train, generator=torch.Generator().manual_seed(0))
    moments = StreamingMoments()
    shards = []
    for split, chosen in (("train", order), ("held_out", torch.arange(n_train, len(x)))):
        for rows in chosen.split(ROWS_PER_SHARD):
            part = x[rows]
            if split == "train":
                moments.add(part)
            entry = write_tensors(folder / f"shard-{len(shards):05d}.safetensors", {hookpoint: part})
            shards.append({"split": split, "rows": len(rows), **entry})
    manifest = {
        "format": FORMAT,
        "finished": False,
        "source": None,
        "model": None,
        "hookpoints": [hookpoint],
        "d_model": {hookpoint: x.shape[1]},
        "dtype": str(x.dtype).removeprefix("torch."),
        "context_length": None,
        "splits": {"train": {"rows": n_train}, "held_out": {"rows": n_held_out}},
        "files": [write_tensors(folder / "order.safetensors", {"order": order})],
        "shards": shards,
    }
    write_manifest(folder, manifest)
    finish_cache(folder, manifest, {hookpoint: moments.moments()})
    return ActivationCache(folder)
