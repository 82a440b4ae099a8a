"""Being asked to stop: SIGTERM, SIGUSR1 and Ctrl-C, between two steps where there are steps."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from types import FrameType

STOPS = (signal.SIGTERM, signal.SIGUSR1)
"""SIGTERM ends a run; SIGUSR1 also puts its SLURM job back into the queue."""


class Stopped(BaseException):
    """The process was asked to stop, and everything worth keeping is kept.

    Not an `Exception`: nothing on the way may take it for a failure that it can pass over.
    """

    def __init__(self, signum: int, kept: str = "") -> None:
        """Describes it.

        Args:
            signum: the signal; the exit status is 128 more.
            kept: where the run stands, in a few words.
        """
        self.signum, self.kept = signal.Signals(signum), kept
        super().__init__(f"stopped by {self.signum.name}{kept and ' ' + kept}")


class StopSignals:
    """Turns signals into a request that training heeds between two steps; elsewhere they end the process."""

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.steps_are_taken = False
        """Whether somebody looks at `received` after every step."""

    def install(self) -> None:
        """Takes over the signals, again where Lightning has; those held back until now are delivered."""
        if threading.current_thread() is not threading.main_thread():
            return
        for signum in (*STOPS, signal.SIGINT):
            signal.signal(signum, self._receive)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        again = self.received is not None
        if not again:
            self.received = signal.Signals(signum)
        if again and signum == signal.SIGINT:
            raise KeyboardInterrupt
        # A second SIGTERM is what SLURM sends while the first one is being heeded.
        if not again and not self.steps_are_taken:
            raise Stopped(signum)

    def wait_to_be_ended(self, seconds: float) -> bool:
        """Whether a signal comes in that time, as a launcher sends to all ranks once one has failed."""
        self.steps_are_taken, self.received = True, None  # signals are recorded, nothing is raised
        end = time.monotonic() + seconds
        while self.received is None and time.monotonic() < end:
            time.sleep(0.05)
        return self.received is not None

    def ignore(self) -> None:
        """Only the exit status counts from here: no signal may change it, nor end a last `scontrol`."""
        if threading.current_thread() is threading.main_thread():
            for signum in STOPS:
                signal.signal(signum, signal.SIG_IGN)


STOP_SIGNALS = StopSignals()
"""Of this process: signals are its own."""


def requeue_slurm_job() -> bool:
    """Puts this SLURM job back into the queue; False where there is no such job.

    Raises:
        RuntimeError: if SLURM refuses.
    """
    array, job = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_JOB_ID")
    if job is None:
        return False
    job = f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}" if array else job
    if not re.fullmatch(r"\d+(_\d+)?", job):
        raise RuntimeError(f"SLURM_JOB_ID is {job!r}")
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"scontrol requeue {job}: {done.stderr.strip()}")
    print(f"job {job} is back in the queue", file=sys.stderr, flush=True)
    return True
