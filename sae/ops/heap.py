"""Memory that the process keeps for its next step."""

from __future__ import annotations

import ctypes
import functools
import platform

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h
_KEPT = 2**30


@functools.cache
def keep_freed_memory() -> bool:
    """Lets the C library keep what tensors on the CPU give back, instead of the kernel.

    A training step frees gradients and takes as much again at once. Without this each page of theirs is
    cleared by the kernel and mapped anew in every step, which takes a fifth of a small one, and more than
    half of one with many latents and few rows. So blocks of any size come from the heap, none from a mapping
    of its own; a threshold for these would be at most 32 MiB, less than many a weight. It holds for the
    whole process, from then on: it keeps what its step took at the most, and more where blocks that stay lie
    between blocks that go. Only a gigabyte or more at the heap's end goes back by itself; `give_back` returns
    all that is free.

    Returns:
        Whether it is so: False where the C library is not glibc.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    libc = ctypes.CDLL(None)
    return bool(libc.mallopt(_M_MMAP_MAX, 0) and libc.mallopt(_M_TRIM_THRESHOLD, _KEPT))


def give_back() -> None:
    """Returns what is free to the kernel, wherever in the heap it lies."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
