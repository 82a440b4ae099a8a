"""Splits and merges: their two measures against singular values, and parts that are found because of them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from sae.baselines import NMF, split_merge
from sae.baselines import nmf as nmf_module
from sae.baselines.nmf_solvers import OnlineLearner
from sae.baselines.split_merge import leave_local_minima, merge_costs, merged, split_and_merged, split_gains
from sae.baselines.sweeps import Reached, learn_until_settled
from sae.benchmarks.nmf import planted_rows
from sae.ops.group import ALONE
from sae.ops.moments import StreamingMoments

_ROWS = 4000


def _parts(n: int = 6, width: int = 24) -> Tensor:
    """Sparse parts of unit length that overlap a little."""
    return F.normalize(torch.rand(n, width) * (torch.rand(n, width) < 0.3) + 1e-3, dim=1)


def _codes(n: int) -> Tensor:
    return torch.rand(_ROWS, n) * (torch.rand(_ROWS, n) < 0.15)


def _stuck(parts: Tensor) -> Tensor:
    """The first two parts in one component, the last in two."""
    return torch.cat([parts[:1] + parts[1:2], parts[2:], parts[-1:] + 0.05 * torch.rand(1, parts.shape[1])])


def _found(parts: Tensor, components: Tensor) -> Tensor:
    return (F.normalize(parts, dim=1) @ F.normalize(components, dim=1).T).amax(dim=1)


def _settled(start: Tensor, rows: Tensor) -> tuple[OnlineLearner, Reached]:
    learner = OnlineLearner(start, ALONE, code_steps=30)
    return learner, learn_until_settled(
        learner, lambda: iter(rows.split(512)), len(rows), passes=200, tolerance=3e-4
    )


def test_what_a_merge_costs_is_the_smaller_singular_value() -> None:
    codes, components = _codes(5), torch.rand(5, 24)
    costs = merge_costs((codes.T @ codes).double(), (components @ components.T).double())
    for i in range(5):
        assert costs[i, i] == torch.inf
        for j in range(i):
            singular = torch.linalg.svdvals(codes[:, [i, j]].double() @ components[[i, j]].double())
            expected = pytest.approx(singular[1].item() ** 2, rel=1e-3)
            assert costs[i, j].item() == expected and costs[j, i].item() == expected


def test_merging_equals_or_with_an_unused_one_costs_nothing() -> None:
    codes, components = _codes(3), torch.rand(3, 24)
    codes[:, 2] = 0
    components[1] = 2 * components[0]
    costs = merge_costs(codes.T @ codes, components @ components.T)
    whole = (codes @ components).square().sum()
    assert costs[0, 1] < 1e-6 * whole and costs[0, 2] < 1e-6 * whole and costs[1, 2] < 1e-6 * whole


def test_two_become_their_first_singular_vector() -> None:
    codes, pair = _codes(2), torch.rand(2, 24)
    singular = torch.linalg.svd(codes @ pair, full_matrices=False)[2][0].abs()
    of_both = merged(codes.T @ codes, pair)
    torch.testing.assert_close(F.normalize(of_both, dim=0), singular, atol=1e-5, rtol=1e-4)
    assert torch.equal(merged(torch.zeros(2, 2), pair), pair[0])


def test_what_a_split_gains_is_the_largest_singular_value_of_what_is_left() -> None:
    left, codes = torch.randn(_ROWS, 6) * torch.tensor([5.0, 1, 1, 1, 1, 1]), _codes(3)
    codes[:, 2] = 0
    gains, steps = split_gains(left, codes)
    for j in range(2):
        used = left[codes[:, j] > 0.1 * codes[:, j].max()]
        _, singular, right = torch.linalg.svd(used)
        assert gains[j] == pytest.approx(singular[0].item() ** 2, rel=1e-3)
        assert abs(F.normalize(steps[j], dim=0) @ right[0]) > 0.999
    assert gains[2] == 0 and (steps[2] == 0).all()


def test_a_component_of_two_parts_is_split_into_them_and_a_part_in_two_is_merged() -> None:
    parts = _parts()
    rows = _codes(6) @ parts
    stuck = _stuck(parts)
    before, after = _found(parts, stuck), _found(parts, split_and_merged(stuck, rows))
    assert before[:2].max() < 0.9 and after.min() > 0.95


def test_nothing_is_tried_where_every_part_is_found() -> None:
    parts = _parts()
    rows = _codes(6) @ parts
    rows += 0.1 * rows.std() * torch.randn(rows.shape)
    assert torch.equal(split_and_merged(parts, rows.clamp(min=0)), parts)
    assert torch.equal(split_and_merged(parts[:2], rows), parts[:2])


@pytest.mark.slow
@pytest.mark.parametrize("world", [0, 1, 4])
def test_the_parts_that_nmf_misses_are_found(world: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the second start, which without splits and merges misses two or three of 128 in these worlds."""
    rows, parts = planted_rows(10_000, world)
    moments = StreamingMoments()
    moments.add(rows)
    fits = []

    def kept(learner: OnlineLearner, *args: object, **kwargs: object) -> OnlineLearner:
        fits.append(learner)
        return leave_local_minima(learner, *args, **kwargs)

    monkeypatch.setattr(nmf_module, "leave_local_minima", kept)
    nmf = NMF(256, 128, signs="none", seed=1).fit([rows], moments.moments())
    assert _found(parts, fits[0].components).min() < 0.95
    assert _found(parts, nmf.components).min() > 0.95


def test_a_trial_that_does_not_help_leaves_all_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = _parts()
    rows = _codes(6) @ parts + 0.01
    learner, reached = _settled(parts, rows)
    before, trials = learner.components.clone(), []

    def useless(components: Tensor, rows: Tensor) -> Tensor:
        trials.append(1)
        return torch.rand(components.shape) * torch.eye(6, 24)

    monkeypatch.setattr(split_merge, "split_and_merged", useless)
    kept = leave_local_minima(
        learner,
        reached.objective,
        rows,
        lambda: iter(rows.split(512)),
        len(rows),
        passes=50,
        tolerance=3e-4,
        group=ALONE,
    )
    assert kept is learner and torch.equal(kept.components, before) and trials == [1]


def test_nmf_takes_no_more_passes_than_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = _parts()
    rows, passes = _codes(6) @ parts + torch.rand(_ROWS, 24), []
    real = OnlineLearner.learn

    def counted(self: OnlineLearner, *args: object) -> float:
        passes.append(1)
        return real(self, *args)

    monkeypatch.setattr(OnlineLearner, "learn", counted)
    streaming = StreamingMoments()
    streaming.add(rows)
    with pytest.warns(UserWarning, match="stopped after passes=3"):
        NMF(24, 6, passes=3, tolerance=0.0, signs="none").fit([rows], streaming.moments())
    assert len(passes) == 3
