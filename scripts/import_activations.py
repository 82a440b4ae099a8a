"""Makes an activation cache of activations that were computed elsewhere.

    python scripts/import_activations.py acts.npy --cache DIR
    python scripts/import_activations.py acts.npy --cache DIR --tokens ids.npy --lengths lengths.npy
    python scripts/import_activations.py part-*.safetensors --tensor resid.6 --cache s3://bucket/cache
    python scripts/import_activations.py saelens_folder/ --cache DIR

Reads .npy, .safetensors, .pt, and folders of Hugging Face `datasets` as SAELens writes them: arrays
(rows, d_model) or (sequences, context, d_model), larger than memory if need be. An interrupted import is
continued by the same command. Then train on it: --data.cache=DIR --data.source=null
--data.hookpoint=null.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

from sae.activations import import_activations
from sae.activations.exchange.array_files import open_array
from sae.activations.exchange.array_folders import TOKENS, ColumnArray, has_tokens, hookpoint_of_column
from sae.activations.exchange.arrays import Array
from sae.activations.exchange.imported import RUN
from sae.errors import InputError
from sae.exits import exit_on_input_error


def main() -> None:
    """Imports, and says what was made."""
    args = _arguments()
    activations = _activations(args.files, args.tensor, args.hookpoint)
    for array in activations.values():
        if array.dtype == torch.float64 and args.dtype == "auto":
            print(f"note: {array.name} is float64; it is stored as float32.")
    cache = import_activations(
        activations,
        args.cache,
        token_ids=_tokens(args.tokens, args.files),
        lengths=args.lengths,
        context_length=args.context_length,
        held_out=args.held_out,
        dtype=args.dtype,
        non_finite=args.non_finite,
        model=args.model,
        device=args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
    )
    rows = ", ".join(f"{cache.n_rows(split):,} {split.replace('_', '-')}" for split in ("train", "held_out"))
    skipped = cache.manifest.get("rows_skipped")
    left_out = f" {skipped:,} rows that are not finite were left out." if skipped else ""
    print(
        f"{cache.location}: {rows} rows of {', '.join(cache.hookpoints)}, {cache.manifest['dtype']};"
        f" finished.{left_out}"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("files", nargs="+", help="files of one kind, joined in order; or a folder of `datasets`")
    add("--cache", required=True, help="folder or URL of the cache")
    add("--hookpoint", action="append", help="name of the activations (acts; one for each --tensor)")
    add("--tensor", action="append", help="which tensor, where files hold several; again for more hookpoints")
    add("--tokens", nargs="+", help="integer array with the token id of each row, or files of it")
    add("--lengths", help="integer array with the number of rows of each sequence, in order")
    add(
        "--context-length",
        type=int,
        default=RUN,
        help=f"rows of each sequence, with --tokens and without --lengths ({RUN})",
    )
    add("--held-out", type=float, default=0.05, help="share held out: the last sequences, or rows (0.05)")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16", "int8"])
    add("--non-finite", default="error", choices=["error", "skip"], help="what to do with NaN rows (error)")
    add("--model", help="language model of the activations, to read latents with; checked against the rows")
    add("--device", help="where moments are computed (default: a GPU where there is one)")
    return parser.parse_args()


def _activations(files: list[str], tensors: list[str] | None, names: list[str] | None) -> dict[str, Array]:
    """The arrays by hookpoint."""
    arrays = [open_array(files, tensor) for tensor in tensors or [None]]
    if names is None and isinstance(arrays[0], ColumnArray):
        names = [hookpoint_of_column(array.column) for array in arrays if isinstance(array, ColumnArray)]
    elif names is None:
        names = list(tensors) if tensors and len(tensors) > 1 else ["acts"]
    if len(set(names)) != len(arrays):
        raise InputError(
            f"`--hookpoint` must be given once for each `--tensor` and differ, got {len(set(names))} names"
            f" for {len(arrays)} tensors."
        )
    return dict(zip(names, arrays, strict=True))


def _tokens(tokens: list[str] | None, files: list[str]) -> Any:
    """As named; a folder that SAELens wrote has its own."""
    if tokens is None and all(Path(file).is_dir() and has_tokens(Path(file)) for file in files):
        return open_array(files, TOKENS)
    return tokens


if __name__ == "__main__":
    exit_on_input_error(main)
