"""Choosing L0: what two dictionaries share, by hand; the choice on made-up curves; planted worlds."""

import math

import pytest
import torch
from torch.nn import functional as F

from sae.activations.synthetic import PlantedWorld
from sae.dictionaries import TopK
from sae.errors import InputError
from sae.studies.l0_choice import Candidate, decide, knee
from sae.studies.l0_search import choose_l0, probe, train
from sae.studies.reproducible import (
    agreement,
    decoder_projection,
    matched,
    mean_cosine,
    pursuit_order,
    shared_firings,
)


def _dictionary(directions):
    dictionary = TopK(directions.shape[1], len(directions), 1)
    with torch.no_grad():
        dictionary.W_dec.copy_(F.normalize(directions, dim=1))
    return dictionary.requires_grad_(False)


def _candidate(l0, *curves, projection=0.0, agreement=0.5):
    return Candidate(float(l0), projection, 0.0, 0.1, agreement, tuple(curves))


def _curve(bends_at, slope=0.9, after=0.1, most=16):
    return tuple(slope * min(m, bends_at) + after * max(0, m - bends_at) for m in range(1, most + 1))


def test_decoder_projection_by_hand():
    """Products 2, -1, 3 and 0: sorted 3, 2, 0, -1; with n = 1 and two rows the third, 0."""
    u = torch.tensor([[3.0, 0.0], [4.0, 1.0]])
    b_dec = torch.tensor([1.0, 1.0])
    assert decoder_projection(u, b_dec, torch.eye(2), 1) == 0.0
    assert decoder_projection(u, b_dec, torch.eye(2), 0) == 3.0
    assert decoder_projection(u, b_dec, torch.eye(2), 9) == -1.0  # beyond the end: the least


def test_mean_cosine_by_hand():
    rows = torch.tensor([[1.0, 0.0], [0.0, -1.0], [0.6, 0.8]])
    assert mean_cosine(rows) == pytest.approx((0.0 + 0.6 + 0.8) / 3)


def test_agreement_ignores_order_and_not_sign():
    rows = torch.eye(3)
    order = torch.tensor([2, 0, 1])
    assert agreement(rows, rows[order]) == pytest.approx(1.0)
    assert rows[order][matched(rows, rows[order])].equal(rows)
    assert agreement(rows, torch.diag(torch.tensor([1.0, 1.0, -1.0]))) == pytest.approx(1 / 3)


def test_pursuit_takes_the_largest_first_and_then_what_is_left():
    """(3, 3.2, 0.05) lies nearest the third direction; what that leaves, along y, then along z."""
    directions = F.normalize(
        torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    )
    order = pursuit_order(torch.tensor([[3.0, 3.2, 0.05], [0.0, 0.0, 2.0]]), directions, 3)
    assert order[0].tolist() == [2, 1, 3]
    assert order[1, 0] == 3


def test_pursuit_finds_the_support_of_planted_rows():
    world = PlantedWorld(64, 48, active=3, max_cosine=0.4)
    rows = world.sample(200)
    order = pursuit_order(rows.x, world.directions, 3)
    right = order.sort(1).values == rows.latents.indices.view(200, 3).sort(1).values
    assert right.all(1).float().mean() > 0.95


def test_pursuit_is_that_of_a_plain_loop():
    torch.manual_seed(3)
    directions, v = F.normalize(torch.randn(20, 8), dim=1), torch.randn(5, 8)
    order = pursuit_order(v, directions, 6)
    for row, found in zip(v, order, strict=True):
        support = []
        for m in range(6):
            atoms = directions[support].T.double()
            fit = torch.linalg.lstsq(atoms, row.double()).solution if support else torch.zeros(0).double()
            left = row.double() - (atoms @ fit if support else 0.0)
            products = directions.double() @ left
            products[support] = -math.inf
            support.append(int(products.argmax()))
            assert support[-1] == found[m], m


def test_shared_firings_of_one_dictionary_in_another_order_are_all():
    torch.manual_seed(0)
    rows = torch.randn(12, 6)
    shared = shared_firings(torch.randn(50, 6), _dictionary(rows), _dictionary(rows[torch.randperm(12)]), 4)
    m = torch.arange(1, 5)
    torch.testing.assert_close(shared, m - m**2 / 12)


def test_shared_firings_of_unrelated_codes_are_near_nothing():
    """Beyond what matching the nearest directions gives, two random dictionaries share what chance does."""
    a, b = (_dictionary(torch.randn(128, 48)) for _ in range(2))
    shared = shared_firings(torch.randn(2000, 48), a, b, 16)
    assert shared[-1] / 16 < 0.25


def test_knee_on_made_up_curves():
    assert knee(_curve(5), 0.5) == 5
    assert knee(_curve(1), 0.5) == 1
    assert knee(_curve(16), 0.5) == 16  # never bends
    assert knee(_curve(5, slope=0.3, after=0.03), 0.5) == 5  # poor dictionaries: the share is relative
    assert knee(_curve(5, after=0.5), 0.6) == 5 and knee(_curve(5, after=0.5), 0.4) == 16


def test_choice_is_of_the_candidate_that_shares_most():
    table = (
        _candidate(1, _curve(2, slope=0.4)),
        _candidate(4, _curve(5)),
        _candidate(8, _curve(6, slope=0.5)),
    )
    choice = decide(table)
    assert (choice.value, choice.low, choice.high) == (5, 5, 5)
    assert choice.best is table[1] and not choice.at_the_edge
    assert str(choice) == "L0 chosen from the data: 5 (5 to 5)"


def test_band_reaches_over_pairs_and_candidates_that_share_nearly_as_much():
    table = (
        _candidate(2, _curve(5), _curve(4)),
        _candidate(4, _curve(6, slope=0.8)),
        _candidate(8, _curve(1)),
    )
    choice = decide(table)
    assert (choice.low, choice.high) == (4, 6) and choice.low <= choice.value <= choice.high


def test_band_is_wide_where_the_curve_bends_slowly():
    slow = tuple(10 * (1 - math.exp(-m / 10)) for m in range(1, 33))
    choice = decide((_candidate(4, slow),))
    assert choice.low < choice.value < choice.high


def test_plateau_without_a_bend_says_that_it_is_at_the_edge():
    choice = decide((_candidate(4, _curve(16)),))
    assert choice.at_the_edge and "at the edge of the grid, 16: widen" in str(choice)


def test_table_marks_the_candidates():
    best = _candidate(4, _curve(5), projection=2.0)
    table = decide((_candidate(2, _curve(3), projection=1.0, agreement=0.9), best)).as_table().splitlines()
    assert table[1].endswith("3 pa") and table[2].endswith("5 *") and table[3].startswith("L0 chosen")
    assert decide((best,)).as_dict()["candidates"][0]["counts"] == [5]


def test_search_is_the_same_again_and_leaves_the_generator_alone():
    rows = PlantedWorld(16, 8, active=2, max_cosine=0.7).sample(400).x
    before = torch.get_rng_state()
    first, second = (choose_l0(probe(8, 16), rows, steps=5, batch_size=64) for _ in range(2))
    assert first == second and first.table[0].l0 == 1.0
    assert torch.get_rng_state().equal(before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": 1}, "`seeds` must be at least 2"),
        ({"steps": 0}, "`steps` must be at least 1"),
        ({"candidates": [4.0, 2.0]}, "`candidates` must increase"),
        ({"candidates": [2.0, 64.0]}, "`candidates` must increase within"),
        ({"rows": 50}, "`rows` must be at least 80"),
    ],
)
def test_bad_values_are_named(change, message):
    rows = torch.randn(change.pop("rows", 200), 8)
    with pytest.raises(InputError, match=message):
        choose_l0(probe(8, 32), rows, **change)


def test_too_narrow_a_dictionary_is_refused():
    with pytest.raises(InputError, match="`n_latents` must be at least 8"):
        choose_l0(probe(8, 4), torch.randn(200, 8))


@pytest.mark.shapes_unchecked
def test_short_runs_learn():
    world = PlantedWorld(24, 12, active=2, max_cosine=0.6)
    x = world.sample(4000).x
    before = probe(12, 24)(2.0)
    dictionary = train(probe(12, 24)(2.0), x, 150, 256)
    error = [(x - d(x).x_hat).square().sum() for d in (before, dictionary)]
    assert error[1] < 0.4 * error[0]


@pytest.mark.slow
@pytest.mark.parametrize("active", [2, 4, 6])
def test_planted_l0_is_found(active):
    """128 directions in 48 dimensions; trained at half, at, and twice the right L0."""
    world = PlantedWorld(128, 48, active=active, max_cosine=0.6)
    x = world.sample(30_000).x
    candidates = [active / 2, float(active), 2.0 * active]
    choice = choose_l0(probe(48, 128), x, candidates=candidates)
    assert active / 1.25 <= choice.value <= active * 1.25
    assert choice.low <= active <= choice.high <= 2 * active
