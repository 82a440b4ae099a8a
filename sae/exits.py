"""How a command ends: messages in a line or two, and exit statuses that tell them apart."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_only

from sae.activations.ranks import launched_ranks
from sae.errors import InputError, RunError
from sae.launch import end_with_parent, explained, is_started_by_lightning
from sae.signals import STOP_SIGNALS, Stopped, requeue_slurm_job

_PATIENCE_S = 10.0  # that other ranks give rank 0 for its last words


def exit_on_input_error(command: Callable[[], None]) -> None:
    """Runs a command; what went wrong is said in a line or two, by rank 0 where it goes wrong there too.

    The exit status is 2 for bad input, 1 for a run that went wrong, 128 + n after signal n; after SIGUSR1 the
    SLURM job is back in the queue.
    """
    rank = _rank()
    try:
        STOP_SIGNALS.install()
        end_with_parent()
        command()
    except (InputError, RunError, MisconfigurationException) as error:
        _say_once(f"error: {error}", said_by_rank_0=getattr(error, "on_all_ranks", False))
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
            _ignore_signals()
            _say(f"\n{stop}; the same command continues.")
            if stop.signum == signal.SIGUSR1:
                _requeue()
        elif stop.signum == signal.SIGUSR1:
            # srun ends all ranks when the first one does: rank 0 must have requeued the job by then.
            STOP_SIGNALS.wait_to_be_ended(_PATIENCE_S)
            _ignore_signals()
        # Lightning's own launcher kills rank 0, which may still be at work, once another rank has failed.
        sys.exit(0 if rank and is_started_by_lightning() else 128 + stop.signum)


def _say_once(message: str, said_by_rank_0: bool) -> None:
    """Rank 0 says it; another rank only if it is the only one that has something to say.

    Launchers end the other ranks when the first one fails. If that were not rank 0, nobody would say why.
    """
    ended = _rank() > 0 and STOP_SIGNALS.wait_to_be_ended(_PATIENCE_S)
    if _rank() == 0 or not (ended or said_by_rank_0):
        _say(message)
    _ignore_signals()


def _ignore_signals() -> None:
    """Where a launcher ends all ranks when the first one does, that no longer changes how this one ends."""
    if launched_ranks().world > 1:
        STOP_SIGNALS.ignore()


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
