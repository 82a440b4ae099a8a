"""Threads that work beside a model's and leave it the cores."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import threadpoolctl
import torch


def background_threads(count: int, name: str) -> ThreadPoolExecutor:
    """An executor whose threads use one core each for operations on tensors.

    By default an operation in any thread starts as many further threads as there are cores, which then
    fight with those of the forward pass or the training.
    """
    return ThreadPoolExecutor(count, name, _take_one_core)


def _take_one_core() -> None:
    torch.get_num_threads()  # the first call in a thread sets their number, so it comes first
    threadpoolctl.threadpool_limits(1, user_api="openmp")
