"""Cancellation in hand-sized codes, and the laws that treatments of signs owe it."""

import pytest
import torch

from sae.errors import InputError
from sae.ops.cancellation import Cancellation, cancellation
from sae.ops.nonnegative import nonnegative_codes
from sae.ops.sparse import from_dense


def test_cancellation_by_hand():
    directions = torch.tensor([[0.6, 0.8], [-0.6, 0.8], [0.0, -1.0]])
    # Row 0: 0.6 - 0.6 cancels, 1.6 is left of 2.8; row 1: (1.2, 0.8) of 2 * 1.4 + 0.8 = 3.6.
    code = from_dense(torch.tensor([[1.0, 1.0, 0.0], [2.0, 0.0, 0.8]]))
    assert cancellation(code, directions) == pytest.approx(1 - (1.6 + 2.0) / (2.8 + 3.6))
    assert cancellation(from_dense(torch.tensor([[1.0, 0.0, 0.0]])), directions) == 0


def test_cancellation_of_signed_and_opposite_parts_tends_to_one():
    directions = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert cancellation(from_dense(torch.tensor([[5.0, -5.0]])), directions) == 1


def test_cancellation_of_nonnegative_parts_is_exactly_none():
    generator = torch.Generator().manual_seed(0)
    atoms = torch.rand(20, 12, generator=generator)
    x = torch.rand(300, 12, generator=generator)
    codes = nonnegative_codes(atoms @ atoms.T, x @ atoms.T)
    assert cancellation(from_dense(codes), atoms) == 0.0
    # Stacked: parts of both signs may cancel each other, those of one sign cannot.
    assert cancellation(from_dense(-codes), atoms) == 0.0
    assert 0 < cancellation(from_dense(codes[:150] - codes[150:]), atoms) < 1


def test_cancellation_of_split_components_is_none_in_their_own_space():
    generator = torch.Generator().manual_seed(1)
    halves, codes = torch.rand(6, 8, generator=generator), from_dense(torch.rand(30, 6, generator=generator))
    assert cancellation(codes, halves) == 0.0
    assert cancellation(codes, halves[:, :4] - halves[:, 4:]) > 0  # what the two halves then take away


def test_cancellation_adds_up_over_batches_and_blocks():
    generator = torch.Generator().manual_seed(2)
    directions = torch.randn(5, 3, generator=generator)
    dense = torch.randn(9000, 5, generator=generator) * (torch.rand(9000, 5, generator=generator) < 0.5)
    measured = Cancellation()
    for rows in dense.split([100, 0, 8900]):
        measured.add(from_dense(rows), directions)
    put_in = (dense.abs() @ directions.abs()).sum(dtype=torch.float64)
    expected = 1 - (dense @ directions).abs().sum(dtype=torch.float64) / put_in
    assert measured.compute() == pytest.approx(expected.item(), abs=1e-6)


def test_cancellation_of_nothing():
    assert cancellation(from_dense(torch.zeros(3, 2)), torch.eye(2)) == 0.0
    with pytest.raises(InputError, match="`Cancellation` needs at least one row, got none; call add"):
        Cancellation().compute()
    with pytest.raises(InputError, match="`indices` must be in"):
        cancellation(from_dense(torch.ones(1, 3)), torch.eye(2))
