"""Threads that work beside a model's and leave it the cores."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import threadpoolctl
import torch


@contextlib.contextmanager
def background_threads(count: int, name: str) -> Iterator[ThreadPoolExecutor]:
    """An executor whose threads use one core each; inside the `with`, products of numpy arrays do too.

    By default an operation in any thread starts as many further threads as there are cores, which then
    fight with those of the forward pass or the training.
    """
    with (
        threadpoolctl.threadpool_limits(1, user_api="blas"),  # numpy's; torch brings its own
        ThreadPoolExecutor(count, name, _take_one_core) as threads,
    ):
        yield threads


def _take_one_core() -> None:
    torch.get_num_threads()  # the first call in a thread sets their number, so it comes first
    threadpoolctl.threadpool_limits(1, user_api="openmp")
