"""Planted worlds are what they say."""

import pytest
import torch

from sae.activations.synthetic import PlantedWorld
from sae.errors import InputError
from sae.ops.geometry import coherence, mean_max_cosine, spread_directions


def test_directions_keep_to_the_bound_and_rows_are_sparse_sums():
    world = PlantedWorld(256, 64, active=3, max_cosine=0.5)
    assert coherence(world.directions) <= 0.5
    torch.testing.assert_close(world.directions.norm(dim=1), torch.ones(256))
    rows = world.sample(100)
    dense = rows.latents.to_dense(256)
    assert (dense > 0).sum(1).tolist() == [3] * 100
    torch.testing.assert_close(rows.x, dense @ world.directions, rtol=1e-4, atol=1e-5)


def test_mean_max_cosine_by_hand_and_between_truth_and_chance():
    truth = torch.eye(3)
    assert mean_max_cosine(truth, torch.eye(3)[[2, 0, 1]] * 5) == pytest.approx(1.0)
    assert mean_max_cosine(truth, torch.tensor([[1.0, 1.0, 0.0]])) == pytest.approx(2 / 3 * 0.5**0.5)


def test_impossible_bound_is_an_error_that_says_what_is_possible():
    with pytest.raises(ValueError, match=r"`max_cosine`=0.1 was not reached .*no set goes below 0.350"):
        spread_directions(20, 6, 0.1, torch.Generator().manual_seed(0), steps=50)


def test_more_active_than_there_are_is_an_error():
    with pytest.raises(InputError, match="`active` must be in"):
        PlantedWorld(8, 4, active=9)
