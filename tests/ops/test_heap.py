"""Tensors that are freed and made again take no pages of the kernel's."""

import platform
import resource

import pytest
import torch

from sae.ops.heap import keep_freed_memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such setting")
def test_memory_is_used_again():
    assert keep_freed_memory()

    def step() -> None:
        held = [
            torch.ones(2**24) for _ in range(4)
        ]  # 64 MiB each: more than glibc's threshold for mappings can be
        del held

    for _ in range(4):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        step()
    pages = (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) * resource.getpagesize()
    assert pages <= 2**26, "of 1 GiB"
