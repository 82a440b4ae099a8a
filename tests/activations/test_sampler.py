"""Batches: every row once a pass, a function of seed and step alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.activations.sampler import RowSampler
from sae.errors import InputError


def _rows(sampler, step):
    """Global row numbers of a batch, in their places."""
    begins = [sum(sampler._shard_rows[:i]) for i in range(len(sampler._shard_rows))]
    batch = torch.full((sampler.batch_size,), -1)
    for part in sampler.batch(step):
        batch[part.places] = part.rows + begins[part.shard]
    return batch


@settings(max_examples=40, deadline=None)
@given(
    shards=st.lists(st.integers(1, 30), min_size=1, max_size=9),
    batch_size=st.integers(1, 40),
    mixed=st.integers(1, 4),
)
def test_every_row_comes_once_per_pass(shards, batch_size, mixed):
    n = sum(shards)
    if batch_size > n:
        return
    sampler = RowSampler(shards, batch_size, seed=3, shards_mixed=mixed)
    stream = torch.cat([_rows(sampler, step) for step in range(-(-2 * n // batch_size))])
    for begin in (0, n):
        assert torch.equal(stream[begin : begin + n].sort().values, torch.arange(n))


def test_a_batch_does_not_depend_on_the_batches_asked_for_before():
    shards = [50, 30, 70]
    forward = RowSampler(shards, 16, seed=0, shards_mixed=2)
    batches = [_rows(forward, step) for step in range(40)]
    for step in (39, 3, 17, 0):
        assert torch.equal(_rows(RowSampler(shards, 16, seed=0, shards_mixed=2), step), batches[step])


def test_passes_and_seeds_have_their_own_orders():
    first, second = (_rows(RowSampler([64], 64, seed=0), step) for step in (0, 1))
    other = _rows(RowSampler([64], 64, seed=1), 0)
    for a, b in ((first, second), (first, other), (second, other)):
        assert not torch.equal(a, b)


def test_rows_of_shards_drawn_together_are_mixed():
    batch = _rows(RowSampler([1000, 1000], 200, seed=0), 0)
    assert 60 < (batch < 1000).sum() < 140


@pytest.mark.parametrize("batch_size", [0, 11])
def test_batch_larger_than_a_pass_is_an_error(batch_size):
    with pytest.raises(InputError, match=rf"`batch_size` must be in \[1, 10\], .* got {batch_size}"):
        RowSampler([4, 6], batch_size, seed=0)
