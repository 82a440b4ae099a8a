"""How rows are dealt to shards: all of them, evenly spread, the same every time."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae.activations.cache.plan import Plan, contexts_per_shard


@settings(max_examples=40, deadline=None)
@given(
    n_train=st.integers(1, 30),
    n_held_out=st.integers(1, 8),
    context=st.integers(1, 9),
    per_shard=st.integers(1, 12),
    masked=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_cached_position_lies_in_one_shard_once(n_train, n_held_out, context, per_shard, masked, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(n_train + n_held_out, context, generator=generator) > 0.4 if masked else None
    plan = Plan(n_train, n_held_out, context, per_shard, mask)
    origin = [plan.layout(shard).origin for shard in plan.shards]
    assert [len(rows) for rows in origin] == [plan.n_rows(shard) for shard in plan.shards]
    everything = torch.arange((n_train + n_held_out) * context)
    expected = everything if mask is None else everything[mask.flatten()]
    assert torch.equal(torch.cat(origin).sort().values, expected)
    held_out = [rows for shard, rows in zip(plan.shards, origin, strict=True) if shard.split == "held_out"]
    assert torch.equal(torch.cat(held_out), expected[expected >= n_train * context])


@settings(max_examples=20, deadline=None)
@given(context=st.integers(1, 9), masked=st.booleans())
def test_places_say_where_rows_taken_context_after_context_lie(context, masked):
    mask = torch.rand(20, context) > 0.3 if masked else None
    plan = Plan(20, 0, context, 7, mask)
    for shard in plan.shards:
        layout = plan.layout(shard)
        rows = (shard.sequences[:, None] * context + torch.arange(context)).flatten()
        if layout.cached is not None:
            rows = rows[layout.cached.flatten()]
        assert torch.equal(layout.origin[layout.places], rows)


def test_each_contexts_rows_are_spread_from_end_to_end_of_its_shard():
    context = 16
    plan = Plan(400, 0, context, 100)
    for shard in plan.shards:
        stretches = (plan.layout(shard).origin // context).reshape(context, -1)
        for stretch in stretches:
            assert torch.equal(stretch.sort().values, shard.sequences.sort().values)


def test_a_context_does_not_lie_in_the_order_of_its_positions():
    context = 16
    origin = Plan(200, 0, context, 200).layout(Plan(200, 0, context, 200).shards[0]).origin
    for stretch in (origin % context).reshape(context, -1):
        assert torch.bincount(stretch, minlength=context).max() < 40  # 12.5 expected of each position


def test_train_contexts_are_dealt_at_random():
    plan = Plan(300, 0, 4, 100)
    for shard in plan.shards:
        assert 0.3 < (shard.sequences < 150).float().mean() < 0.7


def test_the_plan_is_the_same_every_time():
    for a, b in zip(Plan(50, 9, 8, 13).shards, Plan(50, 9, 8, 13).shards, strict=True):
        assert a.file == b.file and torch.equal(a.sequences, b.sequences)
    plan = Plan(50, 9, 8, 13)
    again = [plan.layout(plan.shards[2]).origin for _ in range(2)]
    assert torch.equal(*again)


def test_shards_have_a_good_size_in_small_and_large_caches():
    of_context = 128 * 3080
    assert (
        contexts_per_shard(10**6, 128, 3080) * of_context
        <= 256 * 2**20
        < contexts_per_shard(10**6, 128, 3080) * of_context * 1.01
    )
    small = contexts_per_shard(1000, 128, 3080)
    assert 14 <= 1000 / small <= 30
    assert contexts_per_shard(5, 128, 3080) >= 5
    assert contexts_per_shard(10, 10**6, 16_000) == 1
