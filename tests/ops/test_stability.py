"""Matching between seeds: planted matches, exact nulls, consistent histories."""

import pytest
import torch
from torch.nn import functional as F

from sae.errors import InputError
from sae.ops.geometry import random_rows
from sae.ops.stability import (
    FLOOR,
    capture_histories,
    cosine_exceeds,
    match_threshold,
    mutual_matches,
    null_cosine,
    share_found_again,
    stability_scores,
)


def _random(n, d, seed):
    return random_rows(n, d, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("signed", [True, False])
def test_the_null_is_that_of_random_directions(signed):
    d, n = 8, 50
    cosines = _random(4000, d, 0) @ _random(n, d, 1).T
    largest = (cosines if signed else cosines.abs()).amax(1)
    # The 50 are the same for all rows, so the shares are not quite those of fresh draws.
    assert (largest > null_cosine(n, d, 0.9, signed)).float().mean() == pytest.approx(0.1, abs=0.03)
    share = (cosines if signed else cosines.abs()).gt(0.5).float().mean()
    assert share == pytest.approx(cosine_exceeds(0.5, d, signed), rel=0.1)


def test_the_threshold_is_the_floor_in_many_dimensions_and_more_in_few():
    assert match_threshold(1000, 512) == FLOOR < match_threshold(1000, 8)


def test_permuted_and_disturbed_latents_are_matched_and_strangers_are_not():
    a, order = _random(20, 64, 0), torch.randperm(20, generator=torch.Generator().manual_seed(1))
    b = F.normalize(a[order] + 0.02 * _random(20, 64, 2), dim=1)
    match, cosine = mutual_matches(a, torch.cat([b, _random(5, 64, 3)]), 0.7)
    assert torch.equal(order[match], torch.arange(20)) and (cosine > 0.9).all()
    assert (mutual_matches(a, _random(30, 64, 4), 0.7)[0] == -1).all()


def test_opposite_directions_match_only_without_signs():
    a = torch.eye(4)
    assert (mutual_matches(a, -a, 0.7)[0] == -1).all()
    assert mutual_matches(a, -a, 0.7, signed=False)[0].tolist() == [0, 1, 2, 3]


def test_histories_say_which_seed_caught_what():
    basis = torch.eye(6)
    seeds = [basis[[0, 1, 2]], basis[[1, 0, 3]], basis[[0, 4, 1]]]
    alive = [torch.ones(3, dtype=torch.bool)] * 3
    found = capture_histories(seeds, alive, 0.7)
    assert found.frequencies.tolist() == [3, 0, 2]
    histories = {tuple(row) for row in found.histories.int().tolist()}
    assert histories == {(1, 1, 1), (1, 0, 0), (0, 1, 0), (0, 0, 1)}
    for members in found.members[found.times == 3]:
        directions = [seed[latent] for seed, latent in zip(seeds, members, strict=True)]
        assert torch.equal(directions[0], directions[1]) and torch.equal(directions[0], directions[2])


def test_dead_latents_are_not_caught_and_no_latent_is_in_two_features():
    seeds = [_random(40, 5, seed) for seed in range(4)]
    alive = [torch.arange(40) % 3 > 0] * 4
    found = capture_histories(seeds, alive, 0.8)
    for seed in range(4):
        members = found.members[:, seed]
        members = members[members >= 0]
        assert len(members.unique()) == len(members) == int(alive[seed].sum())
        assert alive[seed][members].all()


def test_stability_is_the_share_of_other_seeds():
    basis = torch.eye(4)
    seeds = [basis[[0, 1]], basis[[0, 2]], basis[[0, 1]]]
    scores = stability_scores(seeds, [torch.ones(2, dtype=torch.bool)] * 3, 0.7)
    assert [score.tolist() for score in scores] == [[1.0, 0.5], [1.0, 0.0], [1.0, 0.5]]


def test_what_is_found_again_does_not_mind_order_and_sign_and_chance_finds_nothing():
    a = _random(50, 64, 0)
    assert share_found_again(a, -a[torch.randperm(50, generator=torch.Generator().manual_seed(0))]) == 1.0
    assert share_found_again(a, _random(50, 64, 1)) < 0.02
    assert share_found_again(a, torch.cat([a[:25], _random(25, 64, 2)])) == pytest.approx(0.5, abs=0.03)


def test_seeds_that_do_not_fit_are_errors():
    one = torch.ones(3, dtype=torch.bool)
    with pytest.raises(InputError):
        capture_histories([torch.eye(3)], [one], 0.7)
    with pytest.raises(InputError):
        capture_histories([torch.eye(3), torch.eye(4)], [one, one], 0.7)
    with pytest.raises(InputError, match=r"`quantile` must be in \(0, 1\)"):
        null_cosine(5, 8, 1.0)
