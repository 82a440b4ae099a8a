"""Batches: every row once a pass, a function of seed and step alone, mixed as well as a full shuffle."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.activations import sampler as sampler_module
from sae.activations.cache.plan import Plan
from sae.activations.sampler import FEWEST_SHUFFLE_ROWS, SHUFFLE_ROWS, RowSampler
from sae.errors import InputError


def _rows(sampler, step, rank=0, world=1):
    """Global row numbers of a batch."""
    begins = [0, *itertools.accumulate(sampler._shard_rows)]
    parts = sampler.batch(step, rank, world)
    return torch.cat([part.rows + begins[part.shard] for part in parts])


_SHARDS = st.lists(st.integers(1, 30), min_size=1, max_size=9)


@pytest.mark.shapes_unchecked
@settings(max_examples=60, deadline=None)
@given(shards=_SHARDS, batch_size=st.integers(1, 40), rounds=st.integers(1, 12), mixed=st.integers(1, 4))
def test_every_row_comes_once_per_pass(shards, batch_size, rounds, mixed):
    n = sum(shards)
    if batch_size > n:
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler_module, "MOST_SHARDS_MIXED", mixed)
        sampler = RowSampler(shards, batch_size, seed=3, rows_per_context=rounds)
    count = torch.zeros(n, dtype=torch.int64)
    for step in range(n):  # n batches are batch_size whole passes
        count += torch.bincount(_rows(sampler, step), minlength=n)
    assert (count == batch_size).all()


@settings(max_examples=40, deadline=None)
@given(shards=_SHARDS, world=st.integers(1, 4), share=st.integers(1, 5), rounds=st.integers(1, 12))
def test_ranks_share_each_batch_equally_and_without_overlap(shards, world, share, rounds):
    batch_size = world * share
    if batch_size > sum(shards):
        return
    sampler = RowSampler(shards, batch_size, seed=1, rows_per_context=rounds)
    for step in range(5):
        parts = [_rows(sampler, step, rank, world) for rank in range(world)]
        assert [len(part) for part in parts] == [share] * world
        assert torch.equal(torch.cat(parts).sort().values, _rows(sampler, step).sort().values)


def test_a_batch_does_not_depend_on_the_batches_asked_for_before(monkeypatch):
    monkeypatch.setattr(sampler_module, "MOST_SHARDS_MIXED", 2)
    shards = [50, 30, 70, 20, 40]
    forward = RowSampler(shards, 16, seed=0, rows_per_context=8)
    batches = [_rows(forward, step) for step in range(60)]
    for step in (59, 3, 30, 0):
        assert torch.equal(_rows(RowSampler(shards, 16, seed=0, rows_per_context=8), step), batches[step])


def test_passes_and_seeds_have_their_own_orders():
    first, second = (_rows(RowSampler([64], 16, seed=0), step).sort().values for step in (0, 4))
    other = _rows(RowSampler([64], 16, seed=1), 0).sort().values
    for a, b in ((first, second), (first, other), (second, other)):
        assert not torch.equal(a, b)


def test_a_window_names_the_shards_that_a_step_reads(monkeypatch):
    monkeypatch.setattr(sampler_module, "MOST_SHARDS_MIXED", 2)
    sampler = RowSampler([50, 30, 70, 20, 40], 16, seed=0, rows_per_context=8)
    assert sampler.windows_per_pass == 3
    for step in range(60):
        windows = range(sampler.window_of(step), sampler.window_of(step + 1) + 1)
        allowed = {shard for window in windows for shard in sampler.shards_of(window)}
        assert {part.shard for part in sampler.batch(step)} <= allowed


@pytest.mark.shapes_unchecked
@settings(max_examples=40, deadline=None)
@given(shards=_SHARDS, batch_size=st.integers(1, 30), steps=st.integers(1, 5), mixed=st.integers(1, 3))
def test_steps_read_from_no_more_windows_than_said(shards, batch_size, steps, mixed):
    if batch_size > sum(shards):
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampler_module, "MOST_SHARDS_MIXED", mixed)
        sampler = RowSampler(shards, batch_size, seed=2)
    for first in range(40):
        seen = set()
        for step in range(first, first + steps):
            seen.add(sampler.window_of(step))
            sampler.batch(step)
            seen.add(sampler.last_window)
        assert max(seen) - min(seen) + 1 <= sampler.most_windows(steps)


@pytest.mark.parametrize("batch_size", [0, 11])
def test_batch_larger_than_a_pass_is_an_error(batch_size):
    with pytest.raises(InputError, match=rf"`batch_size` must be in \[1, 10\], .* got {batch_size}"):
        RowSampler([4, 6], batch_size, seed=0)


def test_buffer_that_cannot_shuffle_is_an_error():
    with pytest.raises(InputError, match="`shuffle_rows` must be at least 2,048, got 100"):
        RowSampler([4, 6], 2, seed=0, shuffle_rows=100)


@pytest.mark.parametrize("shuffle_rows", [SHUFFLE_ROWS, FEWEST_SHUFFLE_ROWS])
@pytest.mark.parametrize(("context", "excluded"), [(128, 0.0), (128, 0.3), (512, 0.0)])
def test_batches_are_mixed_as_well_as_by_a_full_shuffle(shuffle_rows, context, excluded):
    """The numbers that the README promises, on a cache of a million rows in 40 shards."""
    n_sequences = 2**20 // context
    mask = torch.rand(n_sequences, context) >= excluded
    plan = Plan(n_sequences, 0, context, -(-n_sequences // 40), mask)
    origin = [plan.layout(shard).origin for shard in plan.shards]
    everything = torch.cat(origin)
    per_sequence = torch.bincount(everything // context, minlength=n_sequences).double()
    n = len(everything)
    by_chance = float((per_sequence * (per_sequence - 1)).sum() / (n * (n - 1)))
    sampler = RowSampler(
        [len(rows) for rows in origin],
        2048,
        seed=0,
        rows_per_context=int(mask.sum(1).max()),
        shuffle_rows=shuffle_rows,
    )
    pairs = []
    for step in range(0, n // 2048, 9):
        batch = _rows(sampler, step)
        count = torch.bincount(everything[batch] // context, minlength=n_sequences).double()
        pairs.append(float((count * (count - 1)).sum() / (2048 * 2047)))
        expected = per_sequence * 2048 / n
        assert (count <= expected + 3).all()
    assert sum(pairs) / len(pairs) - by_chance <= 1e-3
    assert max(pairs) - by_chance <= 1e-3
