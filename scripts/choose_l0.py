"""Shows which L0 the data of a configuration ask for; trains short runs, and keeps nothing.

    python scripts/choose_l0.py --config quickstart.yaml
    python scripts/choose_l0.py --config quickstart.yaml --data.hookpoint resid.4

Takes the same configuration and overrides as train.py, and makes the cache where it is missing. `train.py`
with `--model.target_l0 auto` (and without the dictionary's own `k` or `target_l0`) does the same and trains.
"""

from __future__ import annotations

import sys

import torch

from sae.cli import SaeCLI
from sae.exits import exit_on_input_error
from sae.studies.l0_run import choose_from


def main(args: list[str] | None = None) -> None:
    """Prints the table; `args` as on the command line."""
    cli = SaeCLI(sys.argv[1:] if args is None else args)
    cli.datamodule.prepare_data()
    cli.datamodule.setup()
    with torch.device("meta"):
        n_latents = max(d.n_latents for d in cli.model.build(cli.datamodule.d_model).values())
    print(choose_from(cli.datamodule, n_latents, cli.trainer.strategy.root_device).as_table())


if __name__ == "__main__":
    exit_on_input_error(main)
