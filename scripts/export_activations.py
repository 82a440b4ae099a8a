"""Writes the rows of an activation cache as a .npy file, in the order of their text.

    python scripts/export_activations.py CACHE --out acts.npy
    python scripts/export_activations.py CACHE --out acts.npy --hookpoint resid.6 --split held_out

Beside it lie acts.tokens.npy, acts.sequence.npy and acts.position.npy, where the cache knows them.
bfloat16 and int8 are written as float32, for .npy has no bfloat16.
"""

from __future__ import annotations

import argparse

from sae.activations import ActivationCache
from sae.activations.exchange.exported import export_activations
from sae.exits import exit_on_input_error


def main() -> None:
    """Exports, and names the files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("cache", help="folder or URL of the cache")
    parser.add_argument("--out", required=True, help="the .npy file to write")
    parser.add_argument("--hookpoint", help="which one (default: the cache's only one)")
    parser.add_argument("--split", default="all", choices=["train", "held_out", "all"])
    args = parser.parse_args()
    cache = ActivationCache(args.cache)
    if cache.manifest["dtype"] in ("bfloat16", "int8"):
        print(f"note: the cache is {cache.manifest['dtype']}; .npy has no such rows, float32 is written.")
    files = export_activations(cache, args.out, hookpoint=args.hookpoint, split=args.split)
    print(f"wrote {', '.join(str(file) for file in files)}")


if __name__ == "__main__":
    exit_on_input_error(main)
