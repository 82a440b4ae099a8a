"""FISTA against scikit-learn's lasso and the conditions of its optimum."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.linear_model import Lasso
from support.planted import errors, planted_codes, random_rows, unit_atoms

from sae.errors import InputError
from sae.ops import fista as module
from sae.ops import slots
from sae.ops.fista import fista, fista_penalty_for_l0

PENALTY = 0.4


@pytest.mark.parametrize(("n", "d"), [(30, 12), (10, 20)])
def test_fista_equals_the_positive_lasso_of_scikit_learn(n: int, d: int) -> None:
    x, atoms = random_rows(20, d), unit_atoms(n, d)
    # scikit-learn divides the squared error by the number of samples, here the columns of x.
    lasso = Lasso(alpha=PENALTY / d, positive=True, fit_intercept=False, tol=1e-12, max_iter=100_000)
    reference = np.stack([lasso.fit(atoms.numpy().T, row).coef_ for row in x.numpy()])
    found = fista(x, atoms, PENALTY, 5000, 1e-9)
    np.testing.assert_allclose(found.to_dense(n).numpy(), reference, atol=1e-5)
    assert (found.values > 0).all()


@pytest.mark.parametrize(("dtype", "slack"), [(torch.float64, 1e-6), (torch.float32, 1e-4)])
def test_fista_meets_the_conditions_of_its_optimum(dtype: torch.dtype, slack: float) -> None:
    x, atoms = random_rows(300, 16, dtype), unit_atoms(64, 16, dtype)
    found = fista(x, atoms, PENALTY, 5000, 1e-7 if dtype == torch.float32 else 1e-9)
    assert found.values.dtype == dtype
    codes = found.to_dense(64)
    slope = (x - codes @ atoms) @ atoms.T - PENALTY
    assert slope.max() < slack, "no latent may be worth raising"
    assert slope[codes > 0].abs().max() < slack, "no active latent may be worth moving"


def test_refit_undoes_the_shrinkage_on_the_same_latents() -> None:
    planted, atoms = planted_codes(100, 96, 3), unit_atoms(96, 80)
    x = planted @ atoms
    lasso = fista(x, atoms, 0.2, 3000, 1e-9).to_dense(96)
    refitted = fista(x, atoms, 0.2, 3000, 1e-9, refit=True).to_dense(96)
    assert ((refitted > 0) <= (lasso > 0)).all()
    assert (errors(x, refitted, atoms) < errors(x, lasso, atoms)).all()
    recovered = (refitted - planted).abs().amax(1) < 1e-6
    assert recovered.float().mean() > 0.9
    slope = (x - refitted @ atoms) @ atoms.T
    assert slope[lasso > 0].max() < 1e-6


def test_orthogonal_atoms_give_lowered_and_cut_projections() -> None:
    x = torch.tensor([[3.0, -1.0, 0.4], [0.0, 0.0, 0.0], [-2.0, 0.6, 0.5]])
    codes = fista(x, torch.eye(3), 0.5)
    torch.testing.assert_close(codes.to_dense(3), torch.tensor([[2.5, 0, 0], [0, 0, 0], [0, 0.1, 0]]))
    assert codes.row_offsets.tolist() == [0, 1, 1, 2]
    assert fista(torch.empty(0, 3), torch.eye(3), 0.5).n_rows == 0


def test_how_rows_are_cut_does_not_matter(monkeypatch) -> None:
    x, atoms = random_rows(40, 10), unit_atoms(40, 10)
    whole = fista(x, atoms, PENALTY, refit=True).to_dense(40)
    monkeypatch.setattr(slots, "_FEWEST_ROWS", 7)
    monkeypatch.setattr(slots, "_ON_CPU", 1)
    torch.testing.assert_close(fista(x, atoms, PENALTY, refit=True).to_dense(40), whole)


@pytest.mark.parametrize(("n", "d"), [(64, 16), (16, 64), (1, 4), (300, 300)])
def test_curvature_bound_is_above_the_largest_eigenvalue_and_near(n: int, d: int) -> None:
    atoms = unit_atoms(n, d)
    largest = float(torch.linalg.eigvalsh(atoms.T @ atoms)[-1])
    assert largest * (1 - 1e-12) <= module._curvature_bound(atoms) <= 1.05 * largest


@pytest.mark.parametrize("l0", [2.0, 5.0])
def test_penalty_for_l0_brings_that_l0(l0: float) -> None:
    x, atoms = random_rows(400, 16), unit_atoms(64, 16)
    penalty = fista_penalty_for_l0(x, atoms, l0)
    assert len(fista(x, atoms, penalty).values) / 400 == pytest.approx(l0, rel=0.02)


def test_l0_out_of_reach_raises() -> None:
    with pytest.raises(InputError, match="`l0` must be one that the lasso reaches"):
        fista_penalty_for_l0(random_rows(20, 4), unit_atoms(20, 4), 15.0)
    with pytest.raises(InputError, match="`l0` must be above 0"):
        fista_penalty_for_l0(random_rows(50, 4), unit_atoms(20, 4), 0.0)


def test_bad_penalty_and_steps_raise() -> None:
    with pytest.raises(InputError, match="`penalty` must be at least 0, got penalty=-1"):
        fista(torch.ones(1, 2), torch.eye(2), -1.0)
    with pytest.raises(InputError, match="`steps` must be at least 1, got steps=0"):
        fista(torch.ones(1, 2), torch.eye(2), 1.0, 0)
