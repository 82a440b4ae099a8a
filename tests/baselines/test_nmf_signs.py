"""NMF's treatments of signed rows and its solvers: each by hand, against references, and its promises."""

from __future__ import annotations

import json
import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from sklearn.decomposition import NMF as SkNMF
from support.ranks import run_ranks
from torch import Tensor

from sae.baselines import NMF
from sae.baselines.nmf_solvers import learner_of, nndsvd_start
from sae.baselines.signed_rows import TREATMENTS
from sae.dictionaries import load_dictionary, save_dictionary
from sae.errors import InputError
from sae.ops.group import ALONE, Group
from sae.ops.moments import Moments, StreamingMoments

SIGNS, SOLVERS = ("split", "shift", "stack", "none"), ("online", "hals", "mu")


def _moments(x: Tensor) -> Moments:
    streaming = StreamingMoments()
    streaming.add(x)
    return streaming.moments()


def _mixture(n: int = 4000, d: int = 32, r: int = 24, noise: float = 0.05, seed: int = 0) -> Tensor:
    """Sparse non-negative mixtures of signed directions, noise, and a mean that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.rand(n, r, generator=generator) * (torch.rand(n, r, generator=generator) < 0.15)
    directions = torch.randn(r, d, generator=generator)
    directions /= directions.norm(dim=1, keepdim=True)
    return codes @ directions + noise * torch.randn(n, d, generator=generator) + 0.5


def _fitted(x: Tensor, n_latents: int, **options: float | str) -> NMF:
    return NMF(x.shape[1], n_latents, **options).fit(list(x.split(1000)), _moments(x))


@pytest.fixture(scope="module")
def mixture() -> Tensor:
    return _mixture(600, 16, 10)


def _nonnegative(n: int = 600, d: int = 16, r: int = 6) -> Tensor:
    """Sparse mixtures of sparse non-negative directions, and noise."""
    generator = torch.Generator().manual_seed(4)
    codes = torch.rand(n, r, generator=generator) * (torch.rand(n, r, generator=generator) < 0.4)
    directions = torch.rand(r, d, generator=generator) * (torch.rand(r, d, generator=generator) < 0.4)
    return codes @ directions + 0.3 * torch.rand(n, d, generator=generator)


def _quick(x: Tensor, n_latents: int, **options: str) -> NMF:
    """Four passes, which may not be enough."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return _fitted(x, n_latents, passes=4, **options)


@pytest.mark.parametrize("solver", ["online", "hals"])
def test_nmf_of_nonnegative_rows_has_scikit_learns_error(solver: str) -> None:
    x = _nonnegative()
    reference = SkNMF(6, solver="cd", init="nndsvda", tol=1e-5, max_iter=2000, random_state=0).fit(x.numpy())
    expected = reference.reconstruction_err_**2 / x.square().sum().item()
    assert _fitted(x, 6, signs="none", solver=solver).objective([x]) <= 1.02 * expected


@pytest.mark.parametrize("solver", SOLVERS)
def test_nmf_of_few_steps_is_near_scikit_learns(solver: str) -> None:
    x = _nonnegative(400)
    reference = SkNMF(6, solver="cd", init="nndsvda", tol=1e-5, max_iter=2000, random_state=0).fit(x.numpy())
    expected = reference.reconstruction_err_**2 / x.square().sum().item()
    assert expected * 0.99 < _quick(x, 6, signs="none", solver=solver).objective([x]) < 2 * expected


@pytest.mark.parametrize("signs", SIGNS)
@pytest.mark.parametrize("solver", ["hals", "mu"])
def test_nmf_sweeps_never_raise_the_objective(signs: str, solver: str) -> None:
    x = _nonnegative(600, 8, 4) if signs == "none" else _mixture(600, 8, 4)
    nmf = _quick(x, 5, signs=signs, solver=solver)
    generator = torch.Generator().manual_seed(0)
    learner = learner_of(solver, nndsvd_start(nmf._nonnegative(x), 5, generator), ALONE, about_mean=True)
    seen = [learner.learn(nmf._nonnegative_rows([x], 256), len(x)) for _ in range(8)]
    assert all(later <= earlier * (1 + 1e-7) for earlier, later in pairwise(seen))
    assert seen[-1] < 0.9 * seen[0]
    assert (learner.components >= 0).all()


def test_nmf_split_and_stack_treat_rows_by_hand() -> None:
    rows = torch.tensor([[1.0, -2.0], [0.0, 3.0]])
    assert TREATMENTS["split"].nonnegative(rows).tolist() == [[1, 0, 0, 2], [0, 3, 0, 0]]
    assert TREATMENTS["stack"].nonnegative(rows).tolist() == [[1, 0], [0, 3], [0, 2], [0, 0]]
    assert TREATMENTS["stack"].folded(torch.tensor([[1.0], [2.0], [4.0], [0.0]])).tolist() == [[-3], [2]]
    assert TREATMENTS["shift"].nonnegative(rows).tolist() == [[1, 0], [0, 3]]


def test_nmf_stacked_code_is_that_of_the_positive_less_that_of_the_negative_part(mixture: Tensor) -> None:
    nmf = _quick(mixture, 8, signs="stack")
    components = nmf.components.double().numpy()
    centred = (mixture[:20].double() - _moments(mixture).mean).numpy()
    codes = [[nnls(components.T, part)[0] for part in (row.clip(0), (-row).clip(0))] for row in centred]
    expected = np.stack([positive - negative for positive, negative in codes])
    np.testing.assert_allclose(nmf.encode(mixture[:20]).numpy(), expected, atol=2e-3)


def test_nmf_shift_counts_from_the_mean_and_clamps_below_the_floor(mixture: Tensor) -> None:
    nmf = _quick(mixture, 8, signs="shift")
    assert torch.equal(nmf.floor, mixture.amin(dim=0))
    torch.testing.assert_close(nmf.encode(nmf.mean), torch.zeros(8), rtol=0, atol=1e-4)
    components = nmf.components.double().numpy()
    rows = torch.cat([mixture[:20], nmf.mean[None]]) - nmf.floor
    codes = np.stack([nnls(components.T, row)[0] for row in rows.double().numpy()])
    np.testing.assert_allclose(nmf.encode(mixture[:20]).numpy(), codes[:20] - codes[20], atol=5e-3)
    torch.testing.assert_close(nmf.encode(nmf.floor - 5), nmf.encode(nmf.floor))


@pytest.mark.parametrize("signs", ["shift", "stack", "none"])
def test_nmf_signed_sparse_code_refits_and_ends_at_least_squares(signs: str) -> None:
    x = _nonnegative(300)
    nmf = _quick(x, 6, signs=signs)
    code = nmf.sparse_code(x, 2)
    left = x - nmf.decode_sparse(code)
    assert ((left @ nmf.directions.T)[code.rows, code.indices]).abs().max() < 1e-4
    assert code.row_offsets.diff().max() == 2 and (code.values < 0).any()
    best = np.linalg.lstsq(nmf.directions.T.numpy(), (x - nmf.mean).T.numpy(), rcond=None)[1].sum()
    for k in (6, 99):
        error = (x - nmf.decode_sparse(nmf.sparse_code(x, k))).square().sum().item()
        assert error == pytest.approx(best, rel=1e-3)


@pytest.mark.parametrize("signs", SIGNS)
def test_nmf_of_every_treatment_is_rebuilt_from_its_saved_form(signs: str, tmp_path: Path) -> None:
    x = _nonnegative(300)
    nmf = _quick(x, 6, signs=signs, solver="hals")
    save_dictionary(nmf, tmp_path)
    again = load_dictionary(tmp_path)
    assert (again.signs, again.solver) == (signs, "hals") and again.inference == nmf.inference
    assert torch.equal(again.encode(x), nmf.encode(x))
    x_hat = nmf.encode(x) @ again.saved_tensors()["W_dec"] + again.saved_tensors()["b_dec"]
    torch.testing.assert_close(x_hat, nmf(x).x_hat)
    torch.testing.assert_close(nmf.directions.norm(dim=1), torch.ones(6))


def test_nmf_saved_before_it_had_treatments_loads(tmp_path: Path, mixture: Tensor) -> None:
    nmf = _quick(mixture, 6)
    save_dictionary(nmf, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["signs"], config["solver"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert torch.equal(load_dictionary(tmp_path).encode(mixture[:9]), nmf.encode(mixture[:9]))


@pytest.mark.parametrize(("signs", "solver"), [("shift", "online"), ("stack", "hals"), ("none", "mu")])
def test_nmf_of_every_treatment_ends_the_same_on_several_ranks(signs: str, solver: str) -> None:
    assert run_ranks(2, _on_ranks, signs, solver) == [None, None]


def _on_ranks(signs: str, solver: str) -> None:
    torch.distributed.init_process_group("gloo")
    x, options = _nonnegative(301), {"signs": signs, "solver": solver, "passes": 3}
    warnings.simplefilter("ignore")
    shared = NMF(16, 4, **options).fit([x[:1], x[1:]], _moments(x), Group.of_training(torch.device("cpu")))
    torch.testing.assert_close(shared.components, NMF(16, 4, **options).fit([x], _moments(x)).components)
    everyone = shared.components.clone()
    torch.distributed.broadcast(everyone, src=0)
    assert torch.equal(everyone, shared.components)


def test_nmf_bad_signs_raise(mixture: Tensor) -> None:
    with pytest.raises(InputError, match="`signs` must be one of split, shift, stack, none, got signs='abs'"):
        NMF(4, 2, signs="abs")
    with pytest.raises(InputError, match="`solver` must be one of online, hals, mu, got solver='cd'"):
        NMF(4, 2, solver="cd")
    with pytest.raises(
        InputError, match='rows must be non-negative for signs="none", got -.*"stack".*SemiNMF'
    ):
        _fitted(mixture, 4, signs="none")
    nmf = _quick(_nonnegative(100), 4, signs="none")
    with pytest.raises(InputError, match="rows must be non-negative"):
        nmf.encode(torch.full((1, 16), -1.0))
    with pytest.raises(InputError, match="a row other than the origin"):
        NMF(16, 4, signs="shift").fit([mixture[:1]], _moments(mixture))
