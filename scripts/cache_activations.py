"""Harvests the activation cache of a configuration, or checks every byte of it; trains nothing.

    python scripts/cache_activations.py --config quickstart.yaml
    python scripts/cache_activations.py --config quickstart.yaml --data.source.n_tokens 2_000_000
    python scripts/cache_activations.py --config quickstart.yaml --verify
    torchrun --nproc-per-node 2 scripts/cache_activations.py --config quickstart.yaml

Takes the same configuration and overrides as train.py. An interrupted harvest is continued; what a finished
cache has lost is made again. Under torchrun or srun each rank makes its share.
"""

from __future__ import annotations

import signal
import sys

# As in train.py: a signal during the imports waits until somebody handles it.
if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1})

from lightning.pytorch.utilities import rank_zero_only

from sae.activations import ActivationCache
from sae.cli import SaeCLI
from sae.exits import exit_on_input_error


def main() -> None:
    """Makes or verifies the cache."""
    arguments = sys.argv[1:]
    if {"-h", "--help"} & set(arguments):
        print(f"{__doc__}\nThe configuration's own options:\n")
    verify = "--verify" in arguments
    cli = SaeCLI([argument for argument in arguments if argument != "--verify"])
    if verify:
        cache = ActivationCache(cli.datamodule.location)
        cache.verify()
    else:
        cli.datamodule.prepare_data()
        cache = ActivationCache(cli.datamodule.location)
    rows = ", ".join(f"{cache.n_rows(split):,} {split.replace('_', '-')}" for split in ("train", "held_out"))
    state = "every checksum is right" if verify else "finished"
    rank_zero_only(print)(
        f"{cache.location}: {rows} rows of {', '.join(cache.hookpoints)}, {cache.manifest['dtype']}; {state}."
    )


if __name__ == "__main__":
    exit_on_input_error(main)
