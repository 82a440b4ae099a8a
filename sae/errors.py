"""The exceptions for what a user can put right: bad values, files, folders; and a run that went wrong."""


class InputError(ValueError):
    """Bad input: the message names what was wrong, what was got and what to do.

    The commands catch it, print the message alone and exit with status 2; in a notebook it is an
    ordinary `ValueError`.
    """

    on_all_ranks = False
    """Whether every rank raises the same: then the first one's message is enough."""


class RunError(RuntimeError):
    """A run that was well described and went wrong: training diverged, the disk is full, a port is taken.

    The commands print the message alone and exit with status 1.
    """

    on_all_ranks = False


class DivergedError(RunError):
    """The loss or its gradient is not finite; the weights are still those of the step before."""

    on_all_ranks = True
