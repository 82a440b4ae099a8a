"""Pursuit against a loop over rows with scipy, on planted codes, and at its edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from sklearn.linear_model import orthogonal_mp
from torch import Tensor

from sae.errors import InputError
from sae.ops import pursuit
from sae.ops.pursuit import largest_codes, nonnegative_pursuit, orthogonal_pursuit


def _atoms(n: int, d: int, seed: int = 0) -> Tensor:
    atoms = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return atoms / atoms.norm(dim=1, keepdim=True)


def _one_row_at_a_time(x: np.ndarray, atoms: np.ndarray, k: int) -> np.ndarray:
    codes = np.zeros((len(x), len(atoms)))
    for row, code in zip(x, codes, strict=True):
        chosen: list[int] = []
        for _ in range(k):
            correlations = atoms @ (row - code @ atoms)
            correlations[chosen] = -np.inf
            if correlations.max() <= 1e-6 * np.linalg.norm(row):
                break
            chosen.append(int(correlations.argmax()))
            code[chosen] = nnls(atoms[chosen].T, row)[0]
    return codes


@pytest.mark.parametrize(("n", "d", "k"), [(40, 10, 8), (16, 16, 16), (30, 20, 15)])
def test_pursuit_equals_a_loop_over_rows(n: int, d: int, k: int) -> None:
    atoms = _atoms(n, d)
    x = torch.randn(300, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.3
    codes = nonnegative_pursuit(x, atoms, k).to_dense(n)
    reference = _one_row_at_a_time(x.numpy(), atoms.numpy(), k)
    assert ((reference > 0).sum(1) < k).any(), "some refits must put a coefficient to zero"
    np.testing.assert_allclose(codes.numpy(), reference, atol=1e-6)


@pytest.mark.parametrize(("n", "d", "k"), [(40, 10, 6), (16, 16, 16), (600, 20, 3)])
def test_orthogonal_pursuit_equals_scikit_learn(n: int, d: int, k: int) -> None:
    atoms = _atoms(n, d)
    x = torch.randn(100, d, generator=torch.Generator().manual_seed(1), dtype=torch.float64) + 0.3
    before = x.clone()
    codes = orthogonal_pursuit(x, atoms, k)
    reference = orthogonal_mp(atoms.T.numpy(), x.T.numpy(), n_nonzero_coefs=k).T
    np.testing.assert_allclose(codes.to_dense(n).numpy(), reference, atol=1e-6)
    assert (codes.values < 0).any() and torch.equal(x, before)


def test_orthogonal_pursuit_beyond_the_dimensions_is_exact_and_stops() -> None:
    atoms, x = _atoms(40, 6), torch.randn(50, 6, dtype=torch.float64)
    code = orthogonal_pursuit(x, atoms, 30)
    torch.testing.assert_close(code.to_dense(40) @ atoms, x)
    assert code.row_offsets.diff().max() <= 7


def test_pursuit_finds_planted_codes() -> None:
    generator = torch.Generator().manual_seed(0)
    atoms = _atoms(80, 64)
    planted = torch.zeros(200, 80, dtype=torch.float64)
    for row in planted:
        row[torch.randperm(80, generator=generator)[:4]] = torch.rand(4, generator=generator).double() + 0.5
    found = nonnegative_pursuit(planted @ atoms, atoms, 8).to_dense(80)
    exact = (found - planted).abs().amax(1) < 1e-6
    assert exact.float().mean() > 0.9


def test_pursuit_of_orthogonal_atoms_is_the_k_largest_positive() -> None:
    x = torch.tensor([[3.0, -9.0, 1.0, 2.0], [-1.0, -2.0, 0.5, -3.0], [0.0, 0.0, 0.0, 0.0]])
    code = nonnegative_pursuit(x, torch.eye(4), 2)
    torch.testing.assert_close(
        code.to_dense(4), torch.tensor([[3.0, 0, 0, 2.0], [0, 0, 0.5, 0], [0, 0, 0, 0]])
    )
    assert code.row_offsets.tolist() == [0, 2, 3, 3]
    assert code.values.dtype == torch.float32


def test_pursuit_error_never_grows_with_k() -> None:
    atoms = _atoms(30, 10)
    x = torch.randn(50, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    errors = [
        (x - nonnegative_pursuit(x, atoms, k).to_dense(30) @ atoms).norm(dim=1) for k in (1, 2, 4, 8, 16, 30)
    ]
    for larger, smaller in zip(errors, errors[1:], strict=False):
        assert (smaller <= larger + 1e-9).all()


def test_pursuit_survives_equal_atoms() -> None:
    atoms = _atoms(6, 4).repeat_interleave(2, dim=0).float()
    x = torch.randn(700, 4, generator=torch.Generator().manual_seed(1))
    code = nonnegative_pursuit(x, atoms, 12)
    assert (code.values > 0).all() and code.values.max() < 10 * x.norm(dim=1).max()


def test_pursuit_does_not_depend_on_the_other_rows() -> None:
    atoms = _atoms(20, 8)
    x = torch.randn(1300, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whole = nonnegative_pursuit(x, atoms, 5).to_dense(20)
    torch.testing.assert_close(whole[1000:1010], nonnegative_pursuit(x[1000:1010], atoms, 5).to_dense(20))


def test_pursuit_without_a_gram_matrix_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    atoms = _atoms(40, 10)
    x = torch.randn(300, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with_gram = [nonnegative_pursuit(x, atoms, 8, threshold).to_dense(40) for threshold in (0.0, 0.3)]
    monkeypatch.setattr(pursuit, "gram_if_it_pays", lambda atoms, rows, rounds: None)
    without = [nonnegative_pursuit(x, atoms, 8, threshold).to_dense(40) for threshold in (0.0, 0.3)]
    torch.testing.assert_close(with_gram, without, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rowwise", [False, True])
def test_pursuit_stops_at_the_residual_threshold_and_not_before(rowwise: bool) -> None:
    atoms = _atoms(30, 10)
    x = torch.randn(200, 10, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    share = (
        torch.linspace(0.1, 0.9, 200, dtype=torch.float64) if rowwise else torch.full((200,), 0.4).double()
    )
    found = nonnegative_pursuit(x, atoms, 30, share if rowwise else 0.4).to_dense(30)
    enough = share * x.norm(dim=1)
    stopped = torch.zeros(200, dtype=torch.bool)
    before = torch.zeros_like(found)
    for k in range(1, 12):
        codes = nonnegative_pursuit(x, atoms, k).to_dense(30)
        stops = (x - codes @ atoms).norm(dim=1) <= enough
        stops &= (x - before @ atoms).norm(dim=1) > enough
        torch.testing.assert_close(found[stops], codes[stops])
        stopped, before = stopped | stops, codes
    assert stopped.float().mean() > 0.9


def test_negative_residual_threshold_raises() -> None:
    with pytest.raises(InputError, match="`residual_threshold` must be at least 0, got -0.5"):
        nonnegative_pursuit(torch.ones(1, 4), torch.eye(4), 2, -0.5)


def test_pursuit_of_no_rows_is_empty() -> None:
    code = nonnegative_pursuit(torch.empty(0, 4), torch.eye(4), 2)
    assert code.n_rows == 0 and len(code.values) == 0


def test_largest_codes_keep_signs_and_drop_zeros() -> None:
    code = largest_codes(torch.tensor([[1.0, -3.0, 2.0, 0.0], [0.0, 0.0, -0.5, 0.0]]), 2)
    torch.testing.assert_close(code.to_dense(4), torch.tensor([[0, -3.0, 2.0, 0], [0, 0, -0.5, 0]]))
    assert code.row_offsets.tolist() == [0, 2, 3]


@pytest.mark.parametrize("k", [0, -1, 5])
def test_k_outside_the_latents_raises(k: int) -> None:
    message = rf"`k` must be in \[1, n_latents=4\], got k={k}"
    with pytest.raises(InputError, match=message):
        nonnegative_pursuit(torch.ones(1, 4), torch.eye(4), k)
    with pytest.raises(InputError, match=message):
        largest_codes(torch.ones(1, 4), k)
