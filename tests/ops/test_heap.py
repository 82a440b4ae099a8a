"""Tensors that are freed and made again take no pages of the kernel's."""

import platform
import resource

import pytest
import torch

from sae.ops.heap import give_back, keep_freed_memory


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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such setting")
def test_what_is_free_goes_back_when_asked_even_below_what_stays():
    assert keep_freed_memory()
    held = [torch.ones(2**24) for _ in range(4)]
    stays = torch.ones(2**16)  # at the heap's end: what is below it would remain
    del held
    before = _resident()
    give_back()
    assert _resident() < before - 200 * 2**20 and stays.sum() == 2**16


def _resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize()
