"""Sets among latents that all seeds find: on directions that are planted in some of them."""

import pytest
import torch
from torch.nn import functional as F

from sae.baselines import RandomDirections
from sae.errors import InputError
from sae.ops.moments import StreamingMoments
from sae.studies.stable_sets import living, stable_sets, table


def _unit(*shape, seed=0):
    return F.normalize(torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=1)


def _seeds(shared, n_own, seeds=3):
    """The shared directions, in another order for each seed, beside some of its own."""
    d = shared.shape[1]
    orders = [torch.randperm(len(shared), generator=torch.Generator().manual_seed(s)) for s in range(seeds)]
    return [torch.cat([shared[order], _unit(n_own, d, seed=100 + s)]) for s, order in enumerate(orders)]


def test_only_what_every_seed_has_is_stable_and_only_what_fires_counts():
    shared = torch.eye(64)[:40]
    seeds = _seeds(shared, 20)
    alive = [torch.ones(60, dtype=torch.bool) for _ in seeds]
    found = stable_sets(seeds, alive, [0.1, 0.5])
    assert found.stable == [40, 40, 40] and found.alive == [60, 60, 60]
    assert [[size.found for size in sizes] for sizes in found.sizes] == [[40, 40]] * 3
    assert all(size.random < 40 for sizes in found.sizes for size in sizes[:1])
    alive[1][:10] = False  # ten of the shared ones, in one seed
    assert stable_sets(seeds, alive, [0.1]).stable == [30, 30, 30]


def test_what_two_of_three_seeds_have_is_not_stable():
    seeds = _seeds(torch.eye(64)[:40], 20)
    seeds[2][:40] = _unit(40, 64, seed=7)
    found = stable_sets(seeds, [torch.ones(60, dtype=torch.bool)] * 3, [0.2])
    assert found.stable == [0, 0, 0] and found.sizes == [[], [], []]
    assert "0.0 of them are found by all" in table(found)


def test_conflicts_among_stable_latents_shrink_the_set():
    twins = torch.eye(32)[:16].repeat(2, 1) + 0.5 * torch.eye(32)  # every row leans on one of sixteen
    seeds = _seeds(F.normalize(twins, dim=1), 8)
    found = stable_sets(seeds, [torch.ones(40, dtype=torch.bool)] * 3, [0.3])
    assert found.stable == [32, 32, 32] and all(sizes[0].found == 16 for sizes in found.sizes)
    assert "| 0.3 | 16.0 |" in table(found)


def test_living_latents_are_those_that_some_row_fires():
    streaming = StreamingMoments()
    streaming.add(torch.cat([torch.eye(8), -torch.eye(8)]))  # of mean zero
    dictionary = RandomDirections(8, 5, seed=0).fit([], streaming.moments())
    fires = living(dictionary, dictionary.directions[:2].split(1))
    code = dictionary.encode_sparse(dictionary.directions[:2])
    assert fires.nonzero().squeeze(1).tolist() == code.indices.unique().tolist()


def test_stable_sets_bad_input_raises():
    rows, alive = _unit(10, 8), torch.ones(10, dtype=torch.bool)
    with pytest.raises(InputError, match="at least 2 seeds, got 1"):
        stable_sets([rows], [alive], [0.2])
    with pytest.raises(InputError, match="epsilon"):
        stable_sets([rows, rows], [alive, alive], [1.5])
