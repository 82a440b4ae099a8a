"""The k largest of every row, against a full sort; by the compiled kernel, and without it."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sae.ops.largest import largest


@pytest.fixture(autouse=True, params=["on", "off"])
def kernels(request, with_kernels):
    with_kernels(request.param)


def _is_right(matrix, k):
    values, found = largest(matrix, k)
    assert found.shape == (len(matrix), k) and torch.equal(values, matrix.gather(1, found))
    assert (found.sort(1).values.diff(dim=1) > 0).all()
    wanted = matrix.sort(dim=1, descending=True).values[:, :k]
    assert torch.equal(matrix.gather(1, found).sort(dim=1, descending=True).values, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("rows", "width", "k"), [(3, 1, 1), (1, 64, 64), (5, 100, 3), (7, 1024, 2), (4, 1037, 5), (2, 9000, 16)]
)
def test_largest_are_those_of_a_full_sort(dtype, rows, width, k):
    _is_right(torch.randn(rows, width).to(dtype), k)


@given(st.integers(1, 6), st.integers(1, 400), st.integers(1, 40), st.integers(0, 3), st.integers(0, 2**31))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_largest_are_right_where_many_are_equal(rows, width, k, values, seed):
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randint(0, values + 1, (rows, width), generator=generator).float()
    _is_right(matrix, min(k, width))


def test_of_a_view_and_of_no_rows():
    _is_right(torch.randn(2000, 6)[:, ::2].T, 4)
    assert largest(torch.empty(0, 50), 3).columns.shape == (0, 3)
    assert largest(torch.empty(0, 5000), 3).columns.shape == (0, 3)


def test_what_is_not_a_number_is_among_the_largest():
    matrix = torch.randn(3, 2000)
    matrix[1, 1234] = torch.nan
    matrix[2, 7] = torch.inf
    matrix[2, 9] = -torch.nan
    found = largest(matrix, 4).columns
    assert 1234 in found[1].tolist() and {7, 9} < set(found[2].tolist())
    assert (largest(torch.full((1, 500), -torch.inf), 3).values == -torch.inf).all()
