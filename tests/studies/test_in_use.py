"""How many features are in use: what is weak, by hand; a tiny world; ten planted worlds nobody told about."""

import json
import math
import random

import pytest
import torch
from torch.nn import functional as F

from sae.activations.synthetic import PlantedWorld, World, WorldConfig
from sae.errors import InputError
from sae.ops.stability import Captures
from sae.studies.in_use import MARGIN, InUse, count_at_width, count_features, is_strong
from sae.studies.seeds import Seeds, train_seeds
from scripts.count_features import main as script_main


def _random(n, d, seed):
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)


def _with_fillers(n_shared, n_fillers, strength_of_fillers, d=48, n_seeds=5):
    """Seeds that share some directions, in other orders, and have fillers of their own."""
    directions, strengths = [], []
    for seed in range(n_seeds):
        order = torch.randperm(n_shared + n_fillers, generator=torch.Generator().manual_seed(seed))
        both = torch.cat([_random(n_shared, d, 99), _random(n_fillers, d, seed)])
        strength = torch.ones(n_shared + n_fillers)
        strength[n_shared:] = strength_of_fillers
        directions.append(both[order])
        strengths.append(strength[order])
    rate = torch.full((n_seeds, n_shared + n_fillers), 0.01)
    return Seeds(torch.stack(directions), rate, torch.stack(strengths))


def test_weak_is_what_is_nearer_to_the_singletons_by_hand():
    """Caught by all: 1; once: 0.01; the edge lies at their geometric mean, 0.1, and never above a half."""
    members = torch.tensor([[0, 0, 0], [1, 1, -1], [2, 2, -1], [3, -1, -1]])
    strength = torch.tensor([[1.0, 0.2, 0.05, 0.01]] * 3)
    assert is_strong(Captures(members), strength).tolist() == [True, True, False, False]
    close = torch.tensor([[1.0, 0.6, 0.4, 0.9]] * 3)
    assert is_strong(Captures(members), close).tolist() == [True, True, False, True]
    assert is_strong(Captures(members[:0]), strength).tolist() == []


def test_shared_directions_are_counted_and_weak_fillers_removed():
    found = count_at_width(_with_fillers(30, 20, 0.1))
    assert found.caught == (100, 0, 0, 0, 30) and found.kept == (0, 0, 0, 0, 30)
    assert found.estimate.value == 30
    assert (found.estimate.low, found.estimate.high) == pytest.approx((30 * (1 - MARGIN), 30 * (1 + MARGIN)))
    assert found.has_room and found.alive == 50


def test_strong_singletons_count_only_as_far_as_the_others_lead_to_expect():
    assert count_at_width(_with_fillers(30, 20, 1.0)).kept == (0, 0, 0, 0, 30)


def test_the_dead_are_not_counted():
    trained = _with_fillers(30, 20, 0.1)
    alive = trained.strength > 0.5
    found = count_at_width(Seeds(trained.directions, trained.rate * alive, trained.strength))
    assert found.caught == (0, 0, 0, 0, 30) and found.alive == 30


def test_the_features_of_a_tiny_world_are_counted_and_a_narrow_one_gives_a_bound():
    """24 features: 24 latents leave no room, 48 do."""
    rows = PlantedWorld(24, 24, active=2, max_cosine=0.5).sample(4000).x
    found = count_features(rows, 2.0, seeds=3, steps=200, batch_size=128)
    assert found.estimate.low <= 24 <= found.estimate.high < 30 and not found.is_bound
    assert [(row.n_latents, row.has_room) for row in found.curve] == [(24, False), (48, True)]
    assert json.loads(json.dumps(found.as_dict()))["value"] == found.estimate.value
    assert "too low" in found.as_table() and "at 90 %" in str(found)
    narrow = InUse(found.curve[0].estimate._replace(high=math.inf), found.curve[:1])
    assert narrow.is_bound and narrow.as_dict()["high"] is None
    assert "at least" in str(narrow) and "no room" in narrow.as_table()


def test_seeds_that_do_not_agree_give_no_upper_end():
    """Noise, and next to no training."""
    rows = torch.randn(1000, 16, generator=torch.Generator().manual_seed(0))
    found = count_features(rows, 2.0, seeds=3, steps=2)
    assert found.is_bound and found.estimate.high == math.inf
    assert "the seeds do not agree: train for more steps" in str(found)


def test_training_is_the_same_again_learns_and_leaves_the_generator_alone():
    world = PlantedWorld(24, 12, active=2, max_cosine=0.6)
    x = world.sample(4000).x
    before = torch.get_rng_state()
    one, two = (train_seeds(x, 24, 3, seeds=2, steps=60, batch_size=128) for _ in range(2))
    assert torch.equal(one.directions, two.directions) and torch.equal(one.strength, two.strength)
    assert torch.equal(torch.get_rng_state(), before)
    torch.testing.assert_close(one.directions.norm(dim=2), torch.ones(2, 24))
    nearest = (world.directions @ one.directions[0].T).amax(1)
    chance = (world.directions @ _random(24, 12, 0).T).amax(1)
    assert nearest.mean() > chance.mean() + 0.15
    assert not torch.equal(one.directions[0], one.directions[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeds": 2}, "`seeds` must be at least 3"),
        ({"l0": 0.0}, "`l0` must be positive"),
        ({"widest": 4}, "`widest` must be at least d_model=8"),
        ({"widths": [16, 8]}, "`widths` must increase"),
        ({"steps": 0}, "`steps` must be at least 1"),
        ({"rows": torch.ones(200, 8)}, "`rows` must differ"),
        ({"rows": torch.randn(50, 8)}, "`rows` must be at least 80"),
    ],
)
def test_bad_values_are_named(change, message):
    arguments = {"rows": torch.randn(200, 8), "l0": 2.0, **change}
    with pytest.raises(InputError, match=message):
        count_features(arguments.pop("rows"), arguments.pop("l0"), **arguments)


def test_more_latents_a_row_than_there_are_is_refused():
    with pytest.raises(InputError, match=r"`k` must be in \[1, n_latents=4\], got 5"):
        train_seeds(torch.randn(200, 8), 4, 5)


def _world(seed):
    """Of 16 to 48 dimensions and 24 to 160 features, some in trees, some correlated."""
    draw = random.Random(seed)
    d = draw.choice([16, 20, 24, 32, 40, 48])
    n = max(24, min(160, round(d * draw.uniform(1.2, 3.6))))
    trees = draw.choice([0, 0, 2, 4])
    return World(
        WorldConfig(
            n_features=n,
            d_model=d,
            zipf_exponent=draw.uniform(0.3, 1.0),
            min_rate=draw.uniform(0.005, 0.012),
            mean_l0=draw.uniform(1.6, 0.08 * d + 1.4),
            n_trees=trees,
            branching=2,
            depth=1,
            correlation_rank=draw.choice([0, 2, 4]),
            correlation_scale=0.1,
            max_cosine=0.55,
            seed=seed,
        )
    )


@pytest.mark.slow
def test_the_interval_covers_the_truth_in_eight_of_ten_planted_worlds():
    """Worlds 20 to 29; rules and margin were settled on 0 to 10. Told: the rows, and their L0."""
    found = {}
    for seed in range(20, 30):
        world = _world(seed)
        estimate = count_features(world.rows(0, 40_960).x, world.mean_l0).estimate
        found[seed] = world.config.n_features, estimate
    covered = [low <= truth <= high for truth, (_, low, high) in found.values()]
    assert sum(covered) >= 8, found
    # Useful too: not covered by being wide, nor without an upper end.
    assert sum(high - low <= 0.5 * truth for truth, (_, low, high) in found.values()) >= 8, found


@pytest.mark.slow
def test_the_script_counts_on_a_cache(write_config, tmp_path, capsys):
    settings = ["--l0", "2", "--widths", "16", "32", "--seeds", "3", "--steps", "20"]
    path = tmp_path / "in_use.json"
    script_main(["--config", str(write_config(tmp_path)), *settings, "--json", str(path)])
    assert "features in use: at least" in capsys.readouterr().out  # twenty steps teach no two seeds the same
    found = json.loads(path.read_text())
    assert [row["n_latents"] for row in found["curve"]] == [16, 32] and found["is_bound"]
    assert all(sum(row["caught"]) >= sum(row["kept"]) for row in found["curve"])
