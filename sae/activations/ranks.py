"""Which of several processes this one is, as torchrun or srun have started it."""

from __future__ import annotations

import os
from typing import NamedTuple


class Ranks(NamedTuple):
    """One process of several that do a work together."""

    rank: int = 0
    world: int = 1


ALONE = Ranks()


def launched_ranks() -> Ranks:
    """The rank and the number of processes that torchrun or srun started; alone otherwise.

    Lightning's own launcher starts its further processes after the first one has made the cache, so they
    count as alone. A batch script's `--ntasks` starts nothing by itself: only inside an srun step are
    there several.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return Ranks(int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]))
    if "SLURM_STEP_NUM_TASKS" in os.environ and "SLURM_PROCID" in os.environ:
        return Ranks(int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_STEP_NUM_TASKS"]))
    return ALONE


def was_restarted() -> bool:
    """Whether SLURM or torchrun started this command again by itself, after a preemption or a crash."""
    counts = (os.environ.get(name, "0") for name in ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT"))
    return any(count not in ("", "0") for count in counts)
