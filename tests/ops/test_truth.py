"""Scores against the truth: by hand, by laws, and between chance and the truth itself."""

import pytest
import torch
from torch.nn import functional as F

from sae.activations.synthetic import PRESETS, World
from sae.errors import InputError
from sae.ops.sparse import from_dense
from sae.ops.truth import (
    TruthMetrics,
    TruthScores,
    between,
    hedging,
    match,
    mcc,
)
from sae.ops.truth_rows import pursuit_with_counts, random_directions, reference_scores

TREE = torch.tensor([-1, 0, 0, -1])  # 1 and 2 are children of 0
AXES = torch.eye(4)
CODE = torch.tensor([
    [2.0, 1.0, 0.0, 0.0],
    [2.0, 0.0, 1.0, 0.0],
    [2.0, 1.0, 0.0, 3.0],
    [2.0, 0.0, 0.0, 0.0],
])  # fmt: skip


def _scores(directions, latents, features=AXES, code=CODE, parents=TREE, batches=1):
    """Scores of a code on a dictionary, added in as many batches."""
    metrics = TruthMetrics(directions, features, parents)
    for true, learned in zip(code.chunk(batches), latents.chunk(batches), strict=True):
        metrics.add(true @ features, learned @ directions, from_dense(learned), from_dense(true))
    return metrics.compute()


def test_the_truth_has_full_marks():
    scores = _scores(AXES, CODE)
    assert scores == TruthScores(
        f1=1.0, precision=1.0, recall=1.0, f1_rare=1.0, f1_of_latents=1.0, mcc=1.0, mmcs=1.0, uniqueness=1.0,
        recovered=1.0, absorption=0.0, hedging=0.0, shrinkage=1.0, fvu=0.0, l0=2.0, true_l0=2.0,
        dead_fraction=0.0, occurring=1.0,
    )  # fmt: skip


@pytest.mark.parametrize("batches", [1, 2, 4])
def test_order_and_sign_and_length_of_latents_and_batches_make_no_difference(batches):
    order = torch.tensor([2, 0, 3, 1])
    signs = torch.tensor([1.0, -1.0, 1.0, -1.0])
    code = CODE[:, order] * signs
    assert _scores(AXES[order] * signs[:, None], code, batches=batches)._replace(mmcs=1.0) == _scores(
        AXES, CODE
    )


def test_half_the_latents_have_half_the_marks():
    half = _scores(AXES[:2], CODE[:, :2])
    assert (half.f1, half.precision, half.recall, half.mcc, half.recovered) == (0.5,) * 5
    assert half.f1_of_latents == half.uniqueness == 1.0  # what rewards narrow dictionaries
    assert half.mmcs == 0.5 and half.f1_rare == 0.0


def test_f1_by_hand():
    latents = CODE.clone()
    latents[3, 1] = 1.0  # a false alarm of feature 1: tp 2, fp 1, fn 0
    latents[1, 2] = 0.0  # feature 2 is missed: never right
    latents[2, 0] = 0.0  # feature 0: tp 3, fn 1
    scores = _scores(AXES, latents)
    assert scores.f1 == pytest.approx((6 / 7 + 4 / 5 + 0 + 1) / 4)
    assert scores.precision == pytest.approx((1 + 2 / 3 + 0 + 1) / 4)
    assert scores.recall == pytest.approx((3 / 4 + 1 + 0 + 1) / 4)
    assert scores.f1_rare == 0.0 and scores.dead_fraction == 0.25


def test_features_that_never_occur_have_no_part_in_f1_but_in_mcc():
    code = CODE.clone()
    code[2, 3] = 0.0
    scores = _scores(AXES[:3], code[:, :3], code=code)
    assert scores.f1 == 1.0 and scores.occurring == 0.75 and scores.mcc == 0.75


def test_entries_that_are_zero_do_not_fire():
    metrics = TruthMetrics(AXES, AXES, TREE)
    code = from_dense(CODE)
    noisy = code._replace(values=code.values.clone().index_fill_(0, torch.tensor([0]), 0.0))
    metrics.add(CODE, CODE, noisy, code)
    assert metrics.compute().recall == pytest.approx((3 / 4 + 3) / 4)


def test_matching_is_one_to_one_and_maximal_against_all_orders():
    import itertools

    truth, learned = random_directions(4, 6, 1), random_directions(5, 6, 2)
    cosines = (truth @ learned.T).abs()
    best = max(sum(cosines[i, j] for i, j in enumerate(p)) for p in itertools.permutations(range(5), 4))
    found = match(truth, learned)
    assert float(found.cosine.sum()) == pytest.approx(float(best))
    assert len(found.latent.unique()) == 4
    assert torch.equal(match(learned, truth).latent.sort().values, torch.tensor([-1, 0, 1, 2, 3]))


def test_mcc_counts_every_feature():
    a = random_directions(20, 16, 1)
    assert mcc(a, a[torch.randperm(20)] * -3) == pytest.approx(1.0)
    assert mcc(a, a[:5]) == pytest.approx(0.25)


def test_uniqueness_by_hand():
    learned = torch.tensor([[1.0, 0.1, 0, 0], [-1.0, 0, 0.1, 0], [0, 0, 0, 2.0]])
    assert _scores(learned, CODE[:, :3]).uniqueness == pytest.approx(2 / 3)


def test_shrinkage_is_the_slope_of_the_magnitudes():
    assert _scores(AXES, 0.8 * CODE).shrinkage == pytest.approx(0.8)
    assert _scores(AXES, 0.8 * CODE).fvu == pytest.approx(0.04 * _scores(AXES, 0 * CODE).fvu, rel=1e-6)
    assert _scores(AXES, 0 * CODE).shrinkage is None


def test_absorption_is_counted_on_the_firings_of_children():
    """Latent 1 is child + parent; on its rows the parent's own latent is silent. Child 2 is sound."""
    directions = AXES.clone()
    directions[1] = F.normalize(torch.tensor([1.0, 1.0, 0, 0]), dim=0)
    latents = CODE.clone()
    latents[CODE[:, 1] > 0, 0] = 0.0
    scores = _scores(directions, latents)
    assert scores.absorption == pytest.approx(2 / 3)  # three firings of children, two of them of child 1
    assert scores.recall == pytest.approx((2 / 4 + 3) / 4)
    assert scores.hedging == pytest.approx(0.0)  # the parent's latent is pure
    silent = latents.clone()
    silent[:, 1] = 0.0  # nobody fires: missed, not absorbed
    assert _scores(directions, silent).absorption == 0.0
    assert _scores(AXES, CODE, parents=None).absorption is None


@pytest.mark.parametrize("share", [0.0, 0.5, -0.4])
def test_hedging_is_the_share_of_the_child_in_the_parents_latent(share):
    directions = AXES.clone()
    directions[0] = -2 * torch.tensor([1.0, share, 0, 0])  # length and sign say nothing
    expected = share / (1 + share**2) ** 0.5 / 2  # over two children
    assert _scores(directions, CODE).hedging == pytest.approx(expected)


def test_hedging_takes_off_what_the_true_directions_have_in_common():
    truth = F.normalize(torch.tensor([[1.0, 0.3, 0], [0.2, 1.0, 0], [0, 0, 1.0]]), dim=-1)
    parents = torch.tensor([-1, 0, -1])
    assert hedging(truth, truth, parents, match(truth, truth)) == pytest.approx(0.0, abs=1e-6)
    lost = torch.eye(3)[2:].repeat(3, 1)  # no latent of the parent's own
    assert hedging(truth, lost, parents, match(truth, lost)) is None


def test_normalised_puts_chance_at_zero_and_the_truth_at_one():
    assert (between(0.2, 0.2, 0.7), between(0.7, 0.2, 0.7)) == (0.0, 1.0)
    assert between(0.1, 0.6, 0.0) == pytest.approx(5 / 6)  # of scores that are better when low, too
    assert between(None, 0.2, 0.7) is between(0.3, 0.5, 0.5) is between(0.3, None, 1.0) is None


def test_a_pursuit_with_counts_has_them_and_keeps_the_largest():
    x = torch.tensor([[3.0, 2.0, 0.1, 0.0], [0.0, 0.0, 1.0, 0.2], [1.0, 1.0, 1.0, 1.0]])
    code = pursuit_with_counts(x, AXES, torch.tensor([2, 1, 0]))
    assert code.row_offsets.tolist() == [0, 2, 3, 3]
    expected = torch.tensor([[3.0, 2.0, 0, 0], [0, 0, 1.0, 0], [0, 0, 0, 0]])
    torch.testing.assert_close(code.to_dense(4), expected)


def _references(name, n_rows):
    world = World(PRESETS[name])
    batches = [world.sample(n_rows)]
    return [
        reference_scores(batches, atoms, world.directions, world.bias, world.parents)
        for atoms in (world.directions, random_directions(*world.directions.shape))
    ]


def _check_references(truth, chance):
    assert truth.f1 >= 0.9 and truth.f1_rare >= 0.9 and truth.mcc == pytest.approx(1.0)
    assert truth.absorption is not None and truth.absorption < 0.01 and truth.fvu < 0.02
    assert truth.hedging == pytest.approx(0.0, abs=1e-6)
    assert chance.f1 < 0.1 and chance.mcc < 0.4 and chance.recovered == 0.0 and chance.fvu > 0.5
    assert truth.l0 == pytest.approx(truth.true_l0, rel=0.01)


def test_the_tiny_world_can_be_told_from_chance():
    """A world counts only if its own directions, with a pursuit's code, reach F1 0.9."""
    _check_references(*_references("tiny", 3000))


@pytest.mark.slow
def test_the_small_world_can_be_told_from_chance():
    _check_references(*_references("small", 4000))


def test_bad_input_is_an_error():
    with pytest.raises(InputError, match="`directions` must have d_model=4 columns .* got 3"):
        TruthMetrics(torch.eye(3), AXES)
    with pytest.raises(InputError, match="`parents` must name 4 features, got 3"):
        TruthMetrics(AXES, AXES, TREE[:3])
    with pytest.raises(InputError, match="no held-out rows to score"):
        TruthMetrics(AXES, AXES).compute()
    with pytest.raises(InputError, match="`truth` must fire on some row"):
        _scores(AXES, CODE, code=0 * CODE)
