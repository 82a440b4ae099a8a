"""How a command ends: messages in a line or two, and exit statuses that tell them apart."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_only

from sae.errors import InputError, RunError
from sae.launch import end_with_parent, explained
from sae.signals import STOP_SIGNALS, Stopped, requeue_slurm_job


def exit_on_input_error(command: Callable[[], None]) -> None:
    """Runs a command; what went wrong is said in a line or two, further ranks with their number.

    The exit status is 2 for bad input, 1 for a run that went wrong, 128 + n after signal n; after SIGUSR1 the
    SLURM job is back in the queue.
    """
    rank = _rank()
    try:
        STOP_SIGNALS.install()
        end_with_parent()
        command()
    except (InputError, RunError, MisconfigurationException) as error:
        if rank == 0 or not getattr(error, "on_all_ranks", False):
            _say(f"error: {error}")
        sys.exit(1 if isinstance(error, RunError) else 2)
    except RuntimeError as error:
        told = explained(error)
        if told is None:
            raise
        _say(f"error: {told}")
        sys.exit(1 if isinstance(told, RunError) else 2)
    except BrokenPipeError:  # whoever read the output has enough of it, e.g. `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        _say(f"error: {error}; what was finished is kept. Make room and run the same command again.")
        sys.exit(1)
    except KeyboardInterrupt:
        _say("\ninterrupted; the same command continues from what is finished.")
        sys.exit(130)
    except Stopped as stop:
        if rank == 0:
            _say(f"\n{stop}; the same command continues.")
            if stop.signum == signal.SIGUSR1:
                _requeue()
        sys.exit(128 + stop.signum)


def _say(message: str) -> None:
    rank = _rank()
    print(f"[rank {rank}] {message}" if rank else message, file=sys.stderr, flush=True)


def _rank() -> int:
    return getattr(rank_zero_only, "rank", None) or 0


def _requeue() -> None:
    try:
        requeue_slurm_job()
    except (OSError, RuntimeError) as error:
        _say(f"the job was not requeued: {error}")
        sys.exit(1)
