"""Ranks that compute together: sums, uneven gathers, shares, agreement."""

import os

import torch
from support.ranks import run_ranks

from sae.ops.group import ALONE, Group
from sae.ops.metrics import ReconstructionMetrics
from sae.ops.sparse import from_dense


def test_alone_everything_is_as_it_is():
    rows = torch.arange(6.0).reshape(3, 2)
    assert ALONE.share(rows) is rows and ALONE.gather(rows) is rows
    assert ALONE.any(True) and not ALONE.any(False) and ALONE.objects("x") == ["x"]
    ALONE.sum_(rows)
    assert rows.sum() == 15


def test_shares_are_stretches_that_make_up_the_whole():
    rows = torch.arange(7)
    shares = [Group(rank, 3).share(rows) for rank in range(3)]
    assert [len(share) for share in shares] == [3, 2, 2] and torch.equal(torch.cat(shares), rows)
    assert [len(Group(rank, 3).share(rows[:1])) for rank in range(3)] == [1, 0, 0]


def _in_group():
    torch.distributed.init_process_group("gloo")
    group = Group.of_training(torch.device("cpu"))
    assert (group.rank, group.world) == (int(os.environ["RANK"]), 3)
    total, counts = torch.tensor(float(group.rank)), torch.tensor([group.rank, 1])
    group.sum_(total, counts)
    assert total == 3.0 and counts.tolist() == [3, 3]
    own = torch.full((group.rank, 2), float(group.rank))  # none, one and two rows
    assert group.gather(own).tolist() == [[1, 1], [2, 2], [2, 2]]
    first = torch.tensor([group.rank + 5.0])
    group.of_first_(first)
    assert first.tolist() == [5.0]
    assert group.any(group.rank == 2) and not group.any(False)
    assert group.objects(group.rank) == [0, 1, 2]
    _scores(group)


def _scores(group):
    """Held-out scores of rows shared by three ranks, one of them with none, are those of all rows."""
    generator = torch.Generator().manual_seed(0)
    x, x_hat = (torch.randn(5, 4, generator=generator) for _ in range(2))
    code, first = (
        torch.randn(5, 6, generator=generator).relu(),
        torch.tensor([True, False, False, True, False]),
    )
    whole, shared = (ReconstructionMetrics(6, torch.zeros(4, dtype=torch.float64)) for _ in range(2))
    whole.add(x, x_hat, from_dense(code), first)
    mine = [slice(0, 3), slice(3, 3), slice(3, 5)][group.rank]
    shared.add(x[mine], x_hat[mine], from_dense(code[mine]), first[mine])
    shared.merge(group)
    for ours, reference in zip(shared.compute(), whole.compute(), strict=True):
        assert abs(ours - reference) < 1e-12


def test_three_ranks_agree():
    outcomes = run_ranks(3, _in_group)
    assert outcomes == [None] * 3, "\n".join(map(str, outcomes))
