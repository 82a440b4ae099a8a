"""What every baseline must do."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable

import pytest
import torch
from support.ranks import run_ranks
from torch import Tensor

import sae
import sae.baselines
from sae.baselines import Baseline
from sae.errors import InputError
from sae.ops.group import Group
from sae.ops.moments import Moments, StreamingMoments

D = 6
MAKERS: dict[str, Callable[[], Baseline]] = {
    "PCA": lambda: sae.baselines.PCA(D),
    "NMF": lambda: sae.baselines.NMF(D, 9, tolerance=0.05),
    "SemiNMF": lambda: sae.baselines.SemiNMF(D, 9, tolerance=0.05),
    "ICA": lambda: sae.baselines.ICA(D),
    "KMeans": lambda: sae.baselines.KMeans(D, 9),
    "DictionaryLearning": lambda: sae.baselines.DictionaryLearning(D, 9, 2, tolerance=0.2),
    "DictionaryLearning-ksvd": lambda: sae.baselines.DictionaryLearning(D, 9, 2, "ksvd", tolerance=0.2),
    "NaturalBasis": lambda: sae.baselines.NaturalBasis(D),
    "RandomDirections": lambda: sae.baselines.RandomDirections(D, 9),
}
READ_AGAIN = set(MAKERS) - {"PCA", "NaturalBasis", "RandomDirections"}
"""Kinds whose fits read the rows more than once."""
READ = {*READ_AGAIN, "NaturalBasis"}
CHECKED = READ - {"NMF", "SemiNMF"}
"""Kinds that read through `mini_batches`, which checks the rows."""


def _rows(n: int = 300) -> Tensor:
    """Laplace sources, mixed, about a mean that is not zero."""
    generator = torch.Generator().manual_seed(0)
    uniform = torch.rand(n, D, generator=generator) - 0.5
    sources = -uniform.sign() * torch.log1p(-1.999 * uniform.abs())
    return sources @ torch.randn(D, D, generator=generator) + 4


def _moments(x: Tensor) -> Moments:
    streaming = StreamingMoments()
    streaming.add(x)
    return streaming.moments()


@functools.cache
def _fitted(name: str) -> Baseline:
    return MAKERS[name]().fit(list(_rows().split(130)), _moments(_rows()))


@pytest.fixture(params=MAKERS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_laws_cover_every_baseline() -> None:
    assert {name.partition("-")[0] for name in MAKERS} == set(sae.baselines.__all__) - {"Baseline"}


def test_directions_are_unit_rows(name: str) -> None:
    fitted = _fitted(name)
    assert fitted.directions.shape == (fitted.n_latents, D)
    torch.testing.assert_close(fitted.directions.norm(dim=1), torch.ones(fitted.n_latents))


def test_decode_is_the_mean_and_latents_times_directions(name: str) -> None:
    fitted, x = _fitted(name), _rows(40)
    torch.testing.assert_close(fitted.mean, _rows().mean(0))
    latents = fitted.encode(x)
    expected = fitted.mean + latents @ fitted.directions
    torch.testing.assert_close(fitted.decode(latents), expected)
    torch.testing.assert_close(fitted(x).x_hat, expected, rtol=1e-4, atol=1e-4)
    code = fitted.sparse_code(x, 3)
    expected = fitted.mean + code.to_dense(fitted.n_latents) @ fitted.directions
    torch.testing.assert_close(fitted.decode_sparse(code), expected)


def test_mean_row_is_itself_without_latents(name: str) -> None:
    fitted = _fitted(name)
    assert len(fitted.sparse_code(fitted.mean[None], 2).values) == 0
    if name != "KMeans":  # there the nearest centroid stands for it
        torch.testing.assert_close(fitted(fitted.mean[None]).x_hat[0], fitted.mean)


def test_sparse_code_has_k_entries_at_most_and_errs_less_with_more(name: str) -> None:
    fitted, x, before = _fitted(name), _rows(), torch.inf
    total = _moments(x).total_variance * len(x)
    for k in (1, 2, 3, 5, 8, fitted.n_latents, 50):
        code = fitted.sparse_code(x, k)
        code.check(fitted.n_latents)
        assert code.n_rows == len(x) and code.row_offsets.diff().max() <= k and (code.values != 0).all()
        error = (x - fitted.decode_sparse(code)).double().square().sum().item()
        assert error <= before * (1 + 1e-4) + 1e-8 * total
        before = error
    with pytest.raises(InputError, match="`k` must be in"):
        fitted.sparse_code(x, 0)


def test_saved_and_loaded_baseline_computes_the_same_bits(name: str, tmp_path) -> None:
    fitted, x = _fitted(name), _rows(80)
    sae.save(fitted, tmp_path)
    again = sae.load(tmp_path)
    assert type(again) is type(fitted) and again.config == fitted.config
    assert torch.equal(again.encode(x), fitted.encode(x))
    for k in (2, 99):
        ours, theirs = fitted.sparse_code(x, k), again.sparse_code(x, k)
        assert torch.equal(ours.values, theirs.values) and torch.equal(ours.indices, theirs.indices)
    state = again.state_dict()
    assert all(torch.equal(state[key], value) for key, value in fitted.state_dict().items())
    other = type(fitted)(**fitted.config)
    other.load_state_dict(fitted.state_dict())
    assert torch.equal(other.encode(x), fitted.encode(x))


def test_same_seed_same_fit_whatever_was_drawn_before(name: str) -> None:
    torch.manual_seed(123)
    again = MAKERS[name]().fit(list(_rows().split(99)), _moments(_rows()))
    assert all(
        torch.equal(again.state_dict()[key], value) for key, value in _fitted(name).state_dict().items()
    )
    model = copy.deepcopy(again).fit([_rows()], _moments(_rows()))  # a second fit starts anew
    assert torch.equal(model.directions, again.directions)


def test_half_precision_rows_come_out_in_the_dtype_of_the_baseline(name: str) -> None:
    fitted, x = _fitted(name), _rows(10).bfloat16()
    assert fitted.encode(x).dtype == fitted.sparse_code(x, 2).values.dtype == torch.float32


def test_use_before_fit_raises(name: str) -> None:
    new, x = MAKERS[name](), _rows(4)
    uses = (
        lambda: new.encode(x),
        lambda: new(x),
        lambda: new.sparse_code(x, 1),
        lambda: new.sparse_code(x, 99),
        lambda: new.directions,
        lambda: new.saved_tensors(),
        lambda: new.decode(torch.zeros(2, new.n_latents)),
    )
    for use in uses:
        with pytest.raises(InputError, match=f"`{type(new).__name__}` must be fitted before use.*call fit"):
            use()


def test_rows_of_another_width_raise(name: str) -> None:
    wide = torch.randn(20, D + 1)
    for use in (_fitted(name).encode, _fitted(name).encode_sparse, lambda x: _fitted(name).sparse_code(x, 2)):
        with pytest.raises(InputError, match=f"must have d_model={D} columns, got"):
            use(wide)
    with pytest.raises(InputError, match=f"`moments` must be of d_model={D} columns, got {D + 1}"):
        MAKERS[name]().fit([wide], _moments(wide))


@pytest.mark.parametrize("kind", sorted(READ_AGAIN))
def test_rows_that_can_be_read_once_raise(kind: str) -> None:
    with pytest.raises(InputError, match="`batches` must be re-iterable, got an iterator"):
        MAKERS[kind]().fit(iter([_rows()]), _moments(_rows()))


@pytest.mark.parametrize("kind", sorted(CHECKED))
def test_rows_that_are_bad_raise(kind: str) -> None:
    x = _rows()
    for value in (torch.nan, torch.inf):
        bad = x.clone()
        bad[-1, 2] = value
        with pytest.raises(InputError, match="`batches` must be finite, got NaN or infinite"):
            MAKERS[kind]().fit([bad], _moments(x))
    with pytest.raises(InputError, match=r"`batches` must be of shape \(rows, d_model=6\), got \(300, 5\)"):
        MAKERS[kind]().fit([x[:, :5]], _moments(x))


def test_rows_that_are_all_the_same_raise(name: str) -> None:
    with pytest.raises(InputError, match="positive total variance, got 0"):
        MAKERS[name]().fit([torch.ones(20, D)], _moments(torch.ones(20, D)))


def _fit_in_a_group(expected: dict[str, Tensor]) -> None:
    torch.distributed.init_process_group("gloo")
    group = Group.of_training(torch.device("cpu"))
    for name, directions in expected.items():
        found = MAKERS[name]().fit([_rows()], _moments(_rows()), group).directions
        torch.testing.assert_close(found, directions, rtol=1e-2, atol=1e-2, msg=name)


def test_two_ranks_find_what_one_does() -> None:
    kinds = set(MAKERS) - {"NMF", "SemiNMF", "PCA"}
    expected = {name: _fitted(name).directions.clone() for name in sorted(kinds)}
    assert run_ranks(2, _fit_in_a_group, expected) == [None, None]
