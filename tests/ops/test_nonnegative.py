"""Batched non-negative least squares against scipy and by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import nnls

from sae.ops.nonnegative import nonnegative_codes


def _problem(rows: int, d: int, r: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    atoms = torch.rand(r, d, generator=generator, dtype=torch.float64) ** 2
    return torch.rand(rows, d, generator=generator, dtype=torch.float64) ** 3, atoms


def test_nonnegative_codes_by_hand() -> None:
    # Unconstrained, the second row would be (3, -1): kept at zero, the first coefficient refits to 2.5.
    gram = torch.tensor([[1.0, 0.5], [0.5, 1.0]])
    codes = nonnegative_codes(gram, torch.tensor([[1.0, 0.5], [2.5, 0.5], [-1.0, -2.0]]))
    torch.testing.assert_close(codes, torch.tensor([[1.0, 0.0], [2.5, 0.0], [0.0, 0.0]]), atol=1e-5, rtol=0)


@pytest.mark.parametrize(("d", "r"), [(30, 12), (12, 12)])
def test_nonnegative_codes_equal_scipy(d: int, r: int) -> None:
    x, atoms = _problem(40, d, r)
    codes = nonnegative_codes(atoms @ atoms.T, x @ atoms.T, tolerance=1e-10, steps=20_000)
    reference = np.stack([nnls(atoms.T.numpy(), row.numpy())[0] for row in x])
    assert (reference == 0).any()
    np.testing.assert_allclose(codes.numpy(), reference, atol=1e-6)


def test_nonnegative_codes_overcomplete_reach_the_least_error() -> None:
    x, atoms = _problem(30, 8, 24)  # codes are not unique, the error is
    codes = nonnegative_codes(atoms @ atoms.T, x @ atoms.T, tolerance=1e-10, steps=20_000)
    error = (x - codes @ atoms).norm(dim=1)
    reference = [nnls(atoms.T.numpy(), row.numpy())[1] for row in x]
    np.testing.assert_allclose(error.numpy(), reference, atol=1e-6)


def test_nonnegative_codes_scale_of_a_component_only_rescales_its_code() -> None:
    x, atoms = _problem(20, 20, 6)
    scaled = atoms * torch.tensor([1e-4, 1.0, 1.0, 1e3, 1.0, 1.0])[:, None]
    codes = nonnegative_codes(atoms @ atoms.T, x @ atoms.T)
    rescaled = nonnegative_codes(scaled @ scaled.T, x @ scaled.T)
    torch.testing.assert_close(rescaled @ scaled, codes @ atoms, atol=1e-6, rtol=0)


def test_nonnegative_codes_of_a_zero_component_are_zero() -> None:
    x, atoms = _problem(10, 12, 5)
    atoms[2] = 0
    codes = nonnegative_codes(atoms @ atoms.T, x @ atoms.T, start=torch.ones(10, 5).double())
    assert (codes[:, 2] == 0).all() and codes.isfinite().all()
    assert (nonnegative_codes(torch.zeros(3, 3), torch.zeros(2, 3)) == 0).all()


def test_nonnegative_codes_from_a_warm_start_need_fewer_steps() -> None:
    x, atoms = _problem(50, 30, 15)
    gram, correlations = atoms @ atoms.T, x @ atoms.T
    solved = nonnegative_codes(gram, correlations, tolerance=1e-12, steps=20_000)
    cold = nonnegative_codes(gram, correlations, steps=5)
    warm = nonnegative_codes(gram, correlations, steps=5, start=solved)
    assert (warm - solved).abs().max() < 1e-9 < 1e-3 < (cold - solved).abs().max()


def test_nonnegative_codes_restart_gives_linear_convergence() -> None:
    # Condition number 1e4: after as many steps without the restart the error is 3e-3.
    spectrum = torch.logspace(-4, 0, 20, dtype=torch.float64)
    basis = torch.linalg.qr(torch.randn(20, 20, generator=torch.Generator().manual_seed(0)).double())[0]
    gram = basis * spectrum @ basis.T
    truth = torch.rand(10, 20, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    codes = nonnegative_codes(gram, truth @ gram, steps=2000, tolerance=0.0)
    assert (codes - truth).abs().max() < 1e-6


def test_nonnegative_codes_do_not_depend_on_the_other_rows() -> None:
    x, atoms = _problem(5000, 10, 6)
    gram, correlations = atoms @ atoms.T, x @ atoms.T
    some = nonnegative_codes(gram, correlations[::7], tolerance=1e-10)
    whole = nonnegative_codes(gram, correlations, tolerance=1e-10)
    torch.testing.assert_close(whole[::7], some, atol=1e-8, rtol=0)


def test_nonnegative_codes_of_no_rows_are_no_rows() -> None:
    assert nonnegative_codes(torch.eye(3), torch.empty(0, 3)).shape == (0, 3)
