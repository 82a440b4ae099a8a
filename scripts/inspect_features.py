"""Shows what the latents of a trained run mean, by tokens.

    python scripts/inspect_features.py runs/quickstart                  the twenty clearest latents
    python scripts/inspect_features.py runs/quickstart --top 50
    python scripts/inspect_features.py runs/quickstart --latent 17      all that is known of one

Reads the run's dictionary and cache, and loads its language model for the tokenizer and unembedding.
"""

from __future__ import annotations

import argparse

from sae.cli import exit_on_input_error
from sae.runs import open_run


def main() -> None:
    """Prints a table or one latent's page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("run", help="run folder (trainer.default_root_dir)")
    parser.add_argument("--latent", type=int, help="show everything about this latent")
    parser.add_argument("--top", type=int, default=20, help="how many of the clearest latents to list")
    args = parser.parse_args()
    reading = open_run(args.run).reading()
    if args.latent is None:
        print(reading.table(reading.clearest(args.top)))
    else:
        print(reading.page(reading.latent(args.latent)))


if __name__ == "__main__":
    exit_on_input_error(main)
