"""Gradient pursuit against a loop over rows, and between matching pursuit and OMP."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.planted import errors, planted_codes, random_rows, unit_atoms

from sae.errors import InputError
from sae.ops import slots
from sae.ops.gradient_pursuit import gradient_pursuit
from sae.ops.matching_pursuit import matching_pursuit
from sae.ops.pursuit import nonnegative_pursuit


def _one_row_at_a_time(x, atoms, k):
    codes = np.zeros((len(x), len(atoms)))
    for row, code in zip(x, codes, strict=True):
        chosen = []
        for _ in range(k):
            correlations = atoms @ (row - code @ atoms)
            free = np.setdiff1d(np.arange(len(atoms)), chosen)
            atom = free[correlations[free].argmax()]
            if correlations[atom] <= 1e-12:
                break
            chosen.append(atom)
            gradient = np.zeros(len(atoms))
            gradient[chosen] = correlations[chosen]
            gradient[(code == 0) & (gradient < 0)] = 0
            step = gradient @ gradient / np.sum((gradient @ atoms) ** 2)
            way = np.maximum(code + step * gradient, 0) - code
            code += min(1.0, gradient @ way / np.sum((way @ atoms) ** 2)) * way
    return codes


@pytest.mark.parametrize(("n", "k"), [(40, 1), (40, 8), (12, 12)])
def test_gradient_pursuit_equals_a_loop_over_rows(n: int, k: int) -> None:
    x, atoms = random_rows(300, 10), unit_atoms(n, 10)
    found = gradient_pursuit(x, atoms, k)
    np.testing.assert_allclose(
        found.to_dense(n).numpy(), _one_row_at_a_time(x.numpy(), atoms.numpy(), k), atol=1e-9
    )
    assert (found.values > 0).all() and (found.row_offsets.diff() <= k).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_pursuit_error_never_grows_with_k(dtype: torch.dtype) -> None:
    x, atoms = random_rows(200, 10, dtype), unit_atoms(30, 10, dtype)
    left = x.norm(dim=1)
    for k in range(1, 31):
        codes = gradient_pursuit(x, atoms, k)
        assert codes.values.dtype == dtype
        now = errors(x, codes.to_dense(30), atoms)
        assert (now <= left + 1e-5).all()
        left = now


@pytest.mark.parametrize("k", [2, 4, 8])
def test_gradient_pursuit_lies_between_matching_pursuit_and_omp(k: int) -> None:
    x, atoms = random_rows(500, 24), unit_atoms(64, 24)
    squared = [
        errors(x, method(x, atoms, k).to_dense(64), atoms).square().mean()
        for method in (nonnegative_pursuit, gradient_pursuit, matching_pursuit)
    ]
    # With two atoms it is matching pursuit: nothing is left along the first.
    assert squared[0] < squared[1] < squared[2] * (1 + 1e-12)
    assert k == 2 or squared[1] < 0.99 * squared[2]


def test_gradient_pursuit_finds_planted_atoms() -> None:
    planted, atoms = planted_codes(200, 128, 4), unit_atoms(128, 96)
    found = gradient_pursuit(planted @ atoms, atoms, 4).to_dense(128)
    assert ((found > 0) == (planted > 0)).all(1).float().mean() > 0.9
    assert (
        errors(planted @ atoms, gradient_pursuit(planted @ atoms, atoms, 30).to_dense(128), atoms).max()
        < 0.05
    )


def test_how_rows_are_cut_does_not_matter(monkeypatch) -> None:
    x, atoms = random_rows(400, 10), unit_atoms(40, 10)
    whole = gradient_pursuit(x, atoms, 6).to_dense(40)
    monkeypatch.setattr(slots, "_FEWEST_ROWS", 7)
    monkeypatch.setattr(slots, "_ON_CPU", 1)
    torch.testing.assert_close(gradient_pursuit(x, atoms, 6).to_dense(40), whole)


def test_rows_that_no_atom_explains_have_no_codes() -> None:
    x = torch.tensor([[0.0, 0.0], [-1.0, -2.0], [2.0, 0.0]])
    codes = gradient_pursuit(x, torch.eye(2), 2)
    assert codes.row_offsets.tolist() == [0, 0, 0, 1] and codes.values.tolist() == [2.0]
    assert gradient_pursuit(torch.empty(0, 2), torch.eye(2), 1).n_rows == 0


@pytest.mark.parametrize("k", [0, 5])
def test_k_outside_the_latents_raises(k: int) -> None:
    with pytest.raises(InputError, match=rf"`k` must be in \[1, n_latents=4\], got k={k}"):
        gradient_pursuit(torch.ones(1, 4), torch.eye(4), k)
