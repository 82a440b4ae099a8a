"""Counts the features in use by what several seeds catch again, over growing widths; keeps no dictionary.

    python scripts/count_features.py --config quickstart.yaml
    python scripts/count_features.py --config quickstart.yaml --l0 12 --seeds 7 --json in_use.json
    python scripts/count_features.py --config quickstart.yaml --l0 12 --widths 128 256 512 1024 --steps 2000

Takes the same configuration and overrides as train.py, and makes the cache where it is missing. What it says
is biased in known ways, which it prints.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from sae.cli import SaeCLI
from sae.exits import exit_on_input_error
from sae.files import write_json
from sae.studies.in_use import count_from


def main(args: list[str] | None = None) -> None:
    """Prints the curve and the number; `args` as on the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--l0", type=float, help="Features a row; chosen from the data if left out.")
    parser.add_argument("--seeds", type=int, default=5, help="Dictionaries of each width.")
    parser.add_argument("--widths", type=int, nargs="+", help="These; doubled until enough if left out.")
    parser.add_argument("--widest", type=int, help="No width above this; 32 d_model if left out.")
    parser.add_argument("--steps", type=int, default=400, help="Optimiser steps of each dictionary.")
    parser.add_argument("--json", type=Path, help="Where to write the same as JSON.")
    own, rest = parser.parse_known_args(sys.argv[1:] if args is None else args)
    cli = SaeCLI(rest)
    cli.datamodule.prepare_data()
    cli.datamodule.setup()
    device = cli.trainer.strategy.root_device
    settings = {name: getattr(own, name) for name in ("seeds", "widths", "widest", "steps")}
    found = count_from(cli.datamodule, own.l0, device, **settings)
    if own.json is not None:
        write_json(own.json, found.as_dict())
    print(found.as_table())


if __name__ == "__main__":
    exit_on_input_error(main)
