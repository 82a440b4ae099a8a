"""Exact non-negative codes against scipy's, one row at a time."""

import numpy as np
import pytest
import torch
from scipy.optimize import nnls

from sae.ops.block_pivoting import exact_nonnegative_codes


def _problem(n_atoms, d, alike=0.0):
    generator = torch.Generator().manual_seed(0)
    atoms = torch.randn(n_atoms, d, dtype=torch.float64, generator=generator) + alike
    return torch.randn(40, d, dtype=torch.float64, generator=generator) + 0.3, atoms


@pytest.mark.parametrize("alike", [0.0, 3.0, 30.0])
def test_exact_codes_are_those_of_scipy_however_alike_the_atoms(alike):
    x, atoms = _problem(8, 12, alike)
    codes = exact_nonnegative_codes(atoms @ atoms.T, x @ atoms.T)
    expected = np.stack([nnls(atoms.T.numpy(), row)[0] for row in x.numpy()])
    np.testing.assert_allclose(codes.numpy(), expected, atol=1e-6)


def test_exact_codes_with_more_atoms_than_dimensions_leave_as_little():
    x, atoms = _problem(9, 6)
    codes = exact_nonnegative_codes(atoms @ atoms.T, x @ atoms.T)
    best = np.array([nnls(atoms.T.numpy(), row)[1] for row in x.numpy()])
    assert (codes >= 0).all()
    np.testing.assert_allclose((x - codes @ atoms).norm(dim=1).numpy(), best, atol=1e-3)


def test_exact_codes_of_zero_and_of_equal_atoms_are_finite():
    x, atoms = _problem(4, 6)
    atoms[1], atoms[2] = 0, atoms[0]
    codes = exact_nonnegative_codes(atoms @ atoms.T, x @ atoms.T)
    assert codes.isfinite().all() and (codes[:, 1] == 0).all()
    best = np.array([nnls(atoms[[0, 3]].T.numpy(), row)[1] for row in x.numpy()])
    np.testing.assert_allclose((x - codes @ atoms).norm(dim=1).numpy(), best, atol=1e-4)
