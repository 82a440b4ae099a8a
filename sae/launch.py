"""How several processes come to train together, and what goes wrong when they do not."""

from __future__ import annotations

import os
import signal
import threading
import time

from sae.errors import InputError, RunError

_LOOK_S = 1.0
_GRACE_S = 20.0
_PEER_DIED = ("connection closed by peer", "connection reset by peer", "broken pipe", "remote process exited")


def check_launch(num_nodes: int) -> None:
    """Raises `InputError` where several processes are meant and nobody would start the others.

    Lightning would wait for them for half an hour, and then fail.
    """
    environment = os.environ
    in_step = "SLURM_STEP_NUM_TASKS" in environment or "TORCHELASTIC_RUN_ID" in environment
    by_hand = "MASTER_ADDR" in environment and "NODE_RANK" in environment
    tasks = int(environment.get("SLURM_NTASKS", "1"))
    if tasks > 1 and "SLURM_JOB_ID" in environment and not in_step:
        raise InputError(
            f"this SLURM job has {tasks} tasks, and this process was not started by srun: the others would"
            " never come. Write `srun python train.py ...`, as scripts/slurm/train.sbatch does; for one"
            " process alone, `srun --ntasks 1`."
        )
    if num_nodes > 1 and not in_step and not by_hand:
        raise InputError(
            f"`trainer.num_nodes` is {num_nodes}, and neither srun nor torchrun has started this process: the"
            " other nodes would never come. See scripts/slurm/train.sbatch, or start torchrun on every node."
        )


def explained(error: RuntimeError) -> InputError | RunError | None:
    """What a failure between processes means, in words; None where it is something else."""
    text = str(error)
    if "EADDRINUSE" in text or "address already in use" in text.lower():
        port = os.environ.get("MASTER_PORT", "the default one")
        return InputError(
            f"the port at which the ranks meet is taken (MASTER_PORT is {port}): another job on this machine"
            " has it, or an earlier one has not gone yet. Set MASTER_PORT to a free one."
        )
    if any(sign in text.lower() for sign in _PEER_DIED):
        return RunError(
            "another rank has gone; see what it said. This one ends; the same command continues from the last"
            " checkpoint."
        )
    return None


def is_started_by_lightning() -> bool:
    """Whether Lightning's own launcher started this process, one of the further ranks of a machine."""
    others = ("SLURM_STEP_NUM_TASKS", "TORCHELASTIC_RUN_ID")
    return "LOCAL_RANK" in os.environ and not any(name in os.environ for name in others)


def end_with_parent() -> None:
    """Ends a process that torchrun or Lightning's own launcher started once its parent has gone.

    Asked first, so that it may save; then for good: a rank that waits for one that is no more waits for
    half an hour. Under srun the node's own daemon sees to it.
    """
    if "LOCAL_RANK" not in os.environ or "SLURM_STEP_NUM_TASKS" in os.environ:
        return
    parent = os.getppid()

    def look() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_S)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(_GRACE_S)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=look, name="end with parent", daemon=True).start()
