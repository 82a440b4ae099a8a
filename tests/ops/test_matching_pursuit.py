"""Matching pursuit against a loop over rows, with and without a Gram matrix, and at its edges."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support.planted import errors, random_rows, unit_atoms
from torch import Tensor

from sae.errors import InputError
from sae.ops import matching_pursuit as module
from sae.ops import slots
from sae.ops.matching_pursuit import matching_pursuit


def _one_row_at_a_time(x, atoms, k, threshold=0.0, first=None):
    codes = np.zeros((len(x), len(atoms)))
    for i, (row, code) in enumerate(zip(x, codes, strict=True)):
        residual = row.copy()
        for turn in range(k):
            correlations = atoms @ residual
            if turn == 0 and first is not None and first[i] >= 0:
                atom = first[i]
            elif np.linalg.norm(residual) <= threshold * np.linalg.norm(row) or correlations.max() <= 1e-12:
                break
            else:
                atom = correlations.argmax()
            code[atom] += max(correlations[atom], 0.0)
            residual -= max(correlations[atom], 0.0) * atoms[atom]
    return codes


@pytest.fixture(params=[True, False], ids=["gram", "no gram"])
def with_gram(request, monkeypatch) -> bool:
    monkeypatch.setattr(
        module, "gram_if_it_pays", lambda atoms, rows, k: atoms @ atoms.T if request.param else None
    )
    return request.param


# 64 atoms are searched in columns, 40 are not.
@pytest.mark.parametrize(("n", "k"), [(40, 1), (40, 6), (64, 12)])
@pytest.mark.parametrize("threshold", [0.0, 0.5])
def test_matching_pursuit_equals_a_loop_over_rows(with_gram, n: int, k: int, threshold: float) -> None:
    x, atoms = random_rows(300, 10), unit_atoms(n, 10)
    found = matching_pursuit(x, atoms, k, threshold)
    reference = _one_row_at_a_time(x.numpy(), atoms.numpy(), k, threshold)
    np.testing.assert_allclose(found.to_dense(n).numpy(), reference, atol=1e-9)
    assert (found.values > 0).all() and (found.row_offsets.diff() <= k).all()
    if k > 6:
        assert (found.row_offsets.diff() < k).any(), "some atoms must have been chosen again"


def test_float32_agrees_with_float64(with_gram) -> None:
    x, atoms = random_rows(200, 32), unit_atoms(64, 32)
    codes = matching_pursuit(x.float(), atoms.float(), 6)
    assert codes.values.dtype == torch.float32
    exact = matching_pursuit(x, atoms, 6).to_dense(64)
    close = (codes.to_dense(64) - exact).abs().amax(1) < 1e-4
    assert close.float().mean() > 0.98, "only near ties may be decided otherwise"


def test_half_precision_atoms_are_worked_on_in_float32() -> None:
    x, atoms = random_rows(50, 16, torch.float32), unit_atoms(32, 16, torch.float32).bfloat16()
    codes = matching_pursuit(x, atoms, 3)
    assert codes.values.dtype == torch.bfloat16
    exact = matching_pursuit(x, atoms.float(), 3)
    torch.testing.assert_close(codes.to_dense(32).float(), exact.to_dense(32), rtol=1e-2, atol=1e-2)


def test_matching_pursuit_finds_planted_codes_of_orthogonal_atoms(with_gram) -> None:
    planted = torch.tensor([[3.0, 0, 1.0, 0], [0, 0, 0, 2.0], [0, 0, 0, 0]])
    codes = matching_pursuit(planted, torch.eye(4), 3)
    torch.testing.assert_close(codes.to_dense(4), planted)
    assert codes.row_offsets.tolist() == [0, 2, 3, 3]


def test_each_row_has_its_own_threshold(with_gram) -> None:
    x, atoms = random_rows(120, 10), unit_atoms(40, 10)
    share = torch.linspace(0.0, 0.9, 120, dtype=torch.float64)
    together = matching_pursuit(x, atoms, 10, share).to_dense(40)
    alone = [matching_pursuit(x[i : i + 1], atoms, 10, float(share[i])).to_dense(40) for i in range(120)]
    torch.testing.assert_close(together, torch.cat(alone))
    left = errors(x, together, atoms) / x.norm(dim=1)
    assert (left[60:] <= share[60:] + 1e-9).all()
    assert matching_pursuit(x, atoms, 10, 1.0).values.numel() == 0


def _first(x: Tensor) -> Tensor:
    first = torch.full((len(x),), -1)
    first[::3] = torch.arange(len(first[::3])) % 40
    return first


def test_first_atoms_are_obeyed(with_gram) -> None:
    x, atoms = random_rows(200, 10), unit_atoms(40, 10)
    first = _first(x)
    found = matching_pursuit(x, atoms, 5, first=first).to_dense(40)
    reference = _one_row_at_a_time(x.numpy(), atoms.numpy(), 5, first=first.numpy())
    np.testing.assert_allclose(found.numpy(), reference, atol=1e-9)
    forced = (first >= 0).nonzero().squeeze(1)
    along = (x[forced] * atoms[first[forced]]).sum(1)
    assert (along > 0).any() and (along <= 0).any()
    assert (found[forced, first[forced]][along > 0] >= along[along > 0] - 1e-12).all()
    torch.testing.assert_close(found[first < 0], matching_pursuit(x[first < 0], atoms, 5).to_dense(40))


def test_how_rows_are_cut_does_not_matter(with_gram, monkeypatch) -> None:
    x, atoms = random_rows(500, 10), unit_atoms(40, 10)
    whole = matching_pursuit(x, atoms, 6, first=_first(x)).to_dense(40)
    monkeypatch.setattr(slots, "_FEWEST_ROWS", 7)
    monkeypatch.setattr(slots, "_ON_CPU", 1)
    torch.testing.assert_close(matching_pursuit(x, atoms, 6, first=_first(x)).to_dense(40), whole)


@pytest.mark.parametrize(("rows", "rounds", "pays"), [(1000, 1, False), (20, 2, False), (20, 6, True)])
def test_a_gram_matrix_is_made_where_it_saves_products(rows: int, rounds: int, pays: bool) -> None:
    assert (slots.gram_if_it_pays(unit_atoms(100, 4), rows, rounds) is not None) == pays


def test_no_rows_have_no_codes() -> None:
    codes = matching_pursuit(torch.empty(0, 4), torch.eye(4), 2, first=torch.empty(0, dtype=torch.int64))
    assert codes.n_rows == 0 and len(codes.values) == 0


@pytest.mark.parametrize("k", [0, -1, 5])
def test_k_outside_the_latents_raises(k: int) -> None:
    with pytest.raises(InputError, match=rf"`k` must be in \[1, n_latents=4\], got k={k}"):
        matching_pursuit(torch.ones(1, 4), torch.eye(4), k)


def test_first_atoms_that_are_not_there_raise() -> None:
    for bad in (4, -2):
        with pytest.raises(InputError, match=r"`first` must be in \[-1, n_latents=4\)"):
            matching_pursuit(torch.ones(1, 4), torch.eye(4), 1, first=torch.tensor([bad]))
