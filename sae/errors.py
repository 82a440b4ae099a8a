"""The one exception for what a user can put right: bad values, files, folders."""


class InputError(ValueError):
    """Bad input: the message names what was wrong, what was got and what to do.

    The commands catch it, print the message alone and exit with status 2; in a notebook it is an
    ordinary `ValueError`.
    """
