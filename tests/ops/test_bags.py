"""Sums of weighted rows and products with rows, against loops: by torch's operations, and by all kernels."""

import os

import pytest
import torch
from ops.conftest import SWITCHES

from sae.ops import bags, kernels


@pytest.fixture(autouse=True, params=SWITCHES)
def switch(request, with_kernels, monkeypatch):
    """Cuts bags for Triton's kernels where these are used: see `test_kernels_in_tritons_interpreter`."""
    with_kernels(request.param)
    module = kernels._module_for("cpu", torch.float32)
    if hasattr(module, "PIECE"):
        monkeypatch.setattr(module, "PIECE", 32)


DTYPES = {torch.float32: 1e-6, torch.bfloat16: 0.01, torch.float16: 1e-3}
LENGTHS = torch.tensor([0, 1, 100, 32, 33, 0, 64, 5, 0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [1, 5, 300])
def test_sums_and_products_are_those_of_a_loop(dtype, width):
    torch.manual_seed(0)
    offsets = torch.nn.functional.pad(LENGTHS.cumsum(0), (1, 0))
    n = int(offsets[-1])
    matrix, left = torch.randn(20, width).to(dtype), torch.randn(len(LENGTHS), width).to(dtype)
    indices, weights = torch.randint(0, 20, (n,)), torch.randn(n).to(dtype)
    rows = torch.arange(len(LENGTHS)).repeat_interleave(LENGTHS)
    sums = torch.zeros(len(LENGTHS), width, dtype=torch.float64)
    dots = torch.zeros(n, dtype=torch.float64)
    for entry in range(n):
        sums[rows[entry]] += weights[entry].double() * matrix[indices[entry]].double()
        dots[entry] = left[rows[entry]].double() @ matrix[indices[entry]].double()
    found = bags.sum_rows(weights, indices, offsets, matrix)
    assert found.dtype == dtype and (found.double() - sums).norm() <= DTYPES[dtype] * sums.norm()
    found = bags.products(left, indices, offsets, matrix)
    assert found.dtype == dtype and (found.double() - dots).norm() <= DTYPES[dtype] * dots.norm()


def test_nothing_is_the_sum_of_nothing():
    none, ends = torch.empty(0, dtype=torch.int64), torch.zeros(4, dtype=torch.int64)
    assert bags.sum_rows(torch.empty(0), none, ends, torch.randn(2, 3)).tolist() == [[0.0] * 3] * 3
    assert bags.products(torch.randn(3, 3), none, ends, torch.randn(2, 3)).shape == (0,)


def test_twice_the_same_is_bit_for_bit_the_same():
    offsets, indices = torch.tensor([0, 500]), torch.randint(0, 50, (500,))
    weights, matrix = torch.randn(500), torch.randn(50, 8)
    first = bags.sum_rows(weights, indices, offsets, matrix)
    assert torch.equal(first, bags.sum_rows(weights, indices, offsets, matrix))


def test_a_dtype_without_kernel_is_served_by_torch():
    matrix = torch.randn(4, 3, dtype=torch.float64)
    found = bags.sum_rows(torch.ones(2).double(), torch.tensor([1, 2]), torch.tensor([0, 2]), matrix)
    torch.testing.assert_close(found[0], matrix[1] + matrix[2])


@pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="without the interpreter torch is asked"
)
def test_the_kernels_are_what_is_tested_here(with_kernels):
    with_kernels("on")
    assert kernels.kernel("sum_rows", torch.ones(1)).__module__ == "sae.ops.kernels.on_gpu"
