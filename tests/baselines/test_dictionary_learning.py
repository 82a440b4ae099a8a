"""Dictionary learning against planted atoms and scikit-learn, its updates by hand, and its promises."""

from __future__ import annotations

import pytest
import torch
from sklearn.decomposition import MiniBatchDictionaryLearning
from torch import Tensor
from torch.nn import functional as F

from sae.baselines import DictionaryLearning
from sae.baselines.atoms import KSVDAtoms, OnlineAtoms, descended, doubles
from sae.baselines.dictionary_learning import METHODS, _replace_idle
from sae.errors import InputError
from sae.ops.group import ALONE
from sae.ops.moments import Moments, StreamingMoments
from sae.ops.pursuit import orthogonal_pursuit
from sae.ops.truth import match


def _moments(x: Tensor) -> Moments:
    streaming = StreamingMoments()
    streaming.add(x)
    return streaming.moments()


def _planted(
    n: int = 4000, d: int = 24, m: int = 36, k: int = 2, noise: float = 0.01
) -> tuple[Tensor, Tensor]:
    """Rows of k atoms out of m with coefficients of both signs, and the atoms."""
    generator = torch.Generator().manual_seed(0)
    atoms = F.normalize(torch.randn(m, d, generator=generator), dim=1)
    chosen = torch.rand(n, m, generator=generator).argsort(1)[:, :k]
    values = torch.randn(n, k, generator=generator).sign() * (0.5 + torch.rand(n, k, generator=generator))
    codes = torch.zeros(n, m).scatter(1, chosen, values)
    return codes @ atoms + noise * torch.randn(n, d, generator=generator) + 1, atoms


def _fitted(
    x: Tensor, n_latents: int, k: int, method: str = "online", **options: float
) -> DictionaryLearning:
    options = {"tolerance": 0.05, "passes": 40} | options
    model = DictionaryLearning(x.shape[1], n_latents, k, method, **options)
    return model.fit(list(x.split(700)), _moments(x))


def _fvu(model: DictionaryLearning, x: Tensor) -> float:
    return ((x - model(x).x_hat).square().sum() / (x - x.mean(0)).square().sum()).item()


@pytest.mark.parametrize("method", METHODS)
def test_dictionary_learning_finds_planted_overcomplete_atoms(method: str) -> None:
    x, atoms = _planted()
    model = _fitted(x, 36, 2, method, tolerance=0.01)
    assert (match(atoms, model.directions).cosine > 0.99).float().mean() > 0.94
    assert _fvu(model, x) < 0.05


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Objective did not converge")  # the reference's L1 codes
def test_dictionary_learning_error_is_no_more_than_that_of_scikit_learn() -> None:
    x, _ = _planted(2000, 16, 20, 3, noise=0.1)
    # Of penalties from 0.1 to 1 this one serves the reference best.
    reference = MiniBatchDictionaryLearning(
        20, alpha=0.5, max_iter=5, batch_size=256, transform_algorithm="omp",
        transform_n_nonzero_coefs=3, fit_algorithm="cd", random_state=0,
    )  # fmt: skip
    centred = (x - x.mean(0)).numpy()
    codes = reference.fit_transform(centred)
    expected = ((centred - codes @ reference.components_) ** 2).sum() / (centred**2).sum()
    for method in METHODS:
        assert _fvu(_fitted(x, 20, 3, method, tolerance=0.01), x) <= expected


def test_dictionary_learning_of_one_atom_is_the_first_principal_component() -> None:
    x = torch.randn(800, 6, generator=torch.Generator().manual_seed(0)) * torch.tensor([3.0, 2, 1, 1, 1, 1])
    first = torch.linalg.eigh(_moments(x).covariance).eigenvectors[:, -1].float()
    for method in METHODS:
        model = _fitted(x, 1, 1, method, tolerance=1e-5, passes=100)
        assert (model.directions[0] @ first).abs() > 0.999


def test_online_update_is_the_coordinate_descent_of_the_paper() -> None:
    generator = torch.Generator().manual_seed(0)
    atoms = F.normalize(torch.randn(150, 7, generator=generator).double(), dim=1)  # more than two blocks
    codes = torch.randn(400, 150, generator=generator).double()
    codes[:, 5] = 0
    rows = torch.randn(400, 7, generator=generator).double()
    a, b = codes.T @ codes, codes.T @ rows
    expected = atoms.clone()
    for j in range(150):
        if j != 5:
            expected[j] = F.normalize((b[j] - a[j] @ expected) / a[j, j] + expected[j], dim=0)
    found = descended(atoms, a, b)
    torch.testing.assert_close(found, expected)
    assert torch.equal(found[5], atoms[5])
    error = (rows - codes @ found).square().sum()
    assert error < (rows - codes @ atoms).square().sum()


def test_ksvd_update_is_the_naive_one() -> None:
    x, _ = _planted(300, 8, 12, 2)
    rows = (x - x.mean(0)).double()
    atoms = F.normalize(rows[:12], dim=1)
    learner = KSVDAtoms(atoms.clone(), 2, rows, ALONE)
    found = learner.learn()
    codes, expected = orthogonal_pursuit(rows, atoms, 2).to_dense(12), atoms.clone()
    for j in range(12):
        users = codes[:, j] != 0
        expected[j] = 0
        left = rows[users] - codes[users] @ expected
        expected[j] = F.normalize(left.T @ codes[users, j], dim=0)
        codes[users, j] = left @ expected[j]
    torch.testing.assert_close(learner.atoms, expected)
    left = (rows - codes @ expected).square().sum(1)
    assert found.objective == pytest.approx((left.sum() / rows.square().sum()).item())
    torch.testing.assert_close(found.worst[0], rows[left.argmax()])


def test_ksvd_replaces_doubles_until_all_planted_atoms_are_there(monkeypatch) -> None:
    x, atoms = _planted(2000, 16, 12, 2)
    start = torch.cat([atoms[:10], atoms[:1], -atoms[1:2]])  # two of the planted ones are missing
    monkeypatch.setattr("sae.baselines.dictionary_learning._drawn", lambda *_: start.clone())
    assert match(atoms, _fitted(x, 12, 2, "ksvd", tolerance=0.01).directions).cosine.min() > 0.99


@pytest.mark.parametrize("method", METHODS)
def test_idle_atoms_become_the_rows_explained_worst(method: str) -> None:
    rows = torch.randn(400, 8, generator=torch.Generator().manual_seed(0))
    atoms = F.normalize(rows[:6], dim=1)
    atoms[4] = -atoms[1]
    if method == "ksvd":
        learner = KSVDAtoms(atoms.clone(), 2, rows, ALONE)
    else:
        learner = OnlineAtoms(atoms.clone(), 2, lambda: iter(rows.split(100)), 400, ALONE)
    learner.learn()
    learner.atoms = atoms.clone()
    used = torch.tensor([True, True, False, True, True, True])
    worst = torch.stack([rows[9], 2 * rows[9], -rows[7], rows[8]])
    assert _replace_idle(learner, used, worst) == 2
    expected = atoms.clone()
    expected[2], expected[4] = F.normalize(rows[9], dim=0), F.normalize(-rows[7], dim=0)
    torch.testing.assert_close(learner.atoms, expected)
    learner.learn()
    assert learner.atoms.isfinite().all()
    assert _replace_idle(learner, used, worst[:0]) == 0  # nothing is explained badly


def test_doubles_are_the_later_ones_of_either_sign() -> None:
    atoms = F.normalize(torch.randn(140, 64, generator=torch.Generator().manual_seed(0)), dim=1)
    atoms[100], atoms[70], atoms[71] = atoms[3], -atoms[69], atoms[3]
    assert doubles(atoms).nonzero().squeeze(1).tolist() == [70, 71, 100]


def test_dictionary_learning_encode_is_its_code_of_k_made_dense() -> None:
    x, _ = _planted(600, 12, 20)
    model = _fitted(x, 20, 3, tolerance=0.2)
    latents, code = model.encode(x.reshape(2, 300, 12)), model.sparse_code(x, 3)
    assert torch.equal(latents.reshape(600, 20), code.to_dense(20))
    assert (code.row_offsets.diff() <= 3).all() and (code.values < 0).any() and (code.values > 0).any()
    left = x - model.decode_sparse(code)
    assert (left @ model.directions.T)[code.rows, code.indices].abs().max() < 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_dictionary_learning_does_not_depend_on_how_batches_are_cut(method: str) -> None:
    x, _ = _planted(900, 8, 10)
    moments = _moments(x)
    fits = []
    for cut in ([900], [1, 400, 0, 499]):
        model = DictionaryLearning(8, 10, 2, method, tolerance=0.2)
        fits.append(model.fit(list(x.split(cut)), moments).components)
    assert torch.equal(*fits)


def test_dictionary_learning_of_few_different_rows_ends_exact() -> None:
    x = torch.tensor([[0.0, 1.0, 2.0], [2.0, 3.0, 0.0], [4.0, 4.0, 4.0]]).repeat(10, 1)
    for method in METHODS:
        model = _fitted(x, 6, 2, method)
        torch.testing.assert_close(model.directions.norm(dim=1), torch.ones(6))
        torch.testing.assert_close(model(x).x_hat, x, rtol=0, atol=1e-4)


def test_dictionary_learning_stopped_by_passes_warns() -> None:
    x, _ = _planted(600, 12, 20)
    with pytest.warns(UserWarning, match="stopped after passes=2: the last one changed .* raise `passes`"):
        _fitted(x, 20, 2, passes=2, tolerance=0.0)


def test_ksvd_of_more_rows_than_it_holds_says_so(monkeypatch) -> None:
    monkeypatch.setattr("sae.baselines.dictionary_learning._KSVD_ROWS", 500)
    x, _ = _planted(600, 8, 10)
    with pytest.warns(UserWarning, match="first 500 of 600 rows"):
        model = _fitted(x, 10, 2, "ksvd")
    moments = _moments(x)
    expected = DictionaryLearning(8, 10, 2, "ksvd", tolerance=0.05, passes=40).fit([x[:500]], moments)
    assert torch.equal(model.directions, expected.directions)


def test_dictionary_learning_bad_input_raises() -> None:
    x, _ = _planted(30, 4, 6)
    with pytest.raises(InputError, match=r"`k` must be in \[1, n_latents=3\], got k=4"):
        DictionaryLearning(4, 3, 4)
    with pytest.raises(InputError, match="`method` must be one of online, ksvd, got 'mod'"):
        DictionaryLearning(4, 3, 2, "mod")
    with pytest.raises(InputError, match="`passes` must be at least 1, got passes=0"):
        DictionaryLearning(4, 3, 2, passes=0)
    with pytest.raises(InputError, match="`n_latents` must be at most the number of rows, 30, got"):
        _fitted(x, 31, 2)
