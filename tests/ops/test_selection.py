"""Which latents fire: against a sort of everything, and by several ranks as by one."""

import pytest
import torch
from support.kinds import make, rows
from support.ranks import run_ranks

from sae.ops import selection
from sae.ops.encoder import PreActs
from sae.ops.group import ALONE, Group
from sae.ops.selection import above, strongest_rows, top_k, top_of_batch
from sae.training.dead_latents import DeadLatents
from sae.training.revival import resample, whose_turn


def _matrix(n_rows=12, n_latents=20, seed=0):
    return torch.randn(n_rows, n_latents, generator=torch.Generator().manual_seed(seed))


def _blocks(matrix, at_once=5):
    """The matrix as an encoder gives it out."""
    n_latents = matrix.shape[1]
    return PreActs(matrix, torch.eye(n_latents).to(matrix), torch.zeros(n_latents).to(matrix), at_once)


@pytest.mark.parametrize("shape", [(1, 1), (5, 3), (12, 20), (64, 7)])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.31, 1.0, 3.0])
def test_top_of_batch_is_the_top_of_the_flattened_matrix(shape, share):
    matrix = _matrix(*shape)
    count = int(share * matrix.numel())
    code = top_of_batch(_blocks(matrix), count)[0]
    kept = torch.zeros(matrix.numel(), dtype=torch.bool)
    kept[matrix.flatten().argsort(descending=True)[:count]] = True
    assert torch.equal(code.to_dense(shape[1]), matrix * kept.view(shape))
    assert len(code.values) == min(count, matrix.numel()) and code.n_rows == shape[0]


def test_a_first_block_that_is_not_like_the_others_misleads_nobody(monkeypatch):
    """The level below which nothing is looked at is guessed from some numbers of the first block."""
    monkeypatch.setattr(selection, "_SAMPLE", 50)
    for offset in (-3.0, 0.0, 3.0):
        matrix = _matrix(200, 40)
        matrix[:20] += offset
        code, _ = top_of_batch(_blocks(matrix, 20), 300)
        kept = torch.zeros(matrix.numel(), dtype=torch.bool)
        kept[matrix.flatten().argsort(descending=True)[:300]] = True
        assert torch.equal(code.to_dense(40), matrix * kept.view(200, 40))


def test_entries_ascend_within_rows():
    code, _ = top_of_batch(_blocks(_matrix()), 50)
    places = code.rows * 20 + code.indices
    assert torch.equal(places, places.sort().values)


def test_of_equal_values_no_more_are_taken_than_asked_for():
    code, _ = top_of_batch(_blocks(torch.tensor([[1.0, 2.0, 1.0], [1.0, 0.0, 1.0]])), 3)
    assert sorted(code.values.tolist()) == [1.0, 1.0, 2.0]


def test_top_k_and_above_by_hand():
    matrix = torch.tensor([[3.0, -1.0, 2.0], [-3.0, -1.0, -2.0]])
    assert top_k(matrix, 2).to_dense(3).tolist() == [[3.0, 0.0, 2.0], [0.0, -1.0, -2.0]]
    assert above(matrix, torch.tensor(2.0)).to_dense(3).tolist() == [[3.0, 0.0, 0.0], [0.0] * 3]
    assert above(matrix, torch.tensor([5.0, -2.0, 1.0])).indices.tolist() == [1, 2, 1]


def test_a_threshold_is_compared_in_its_own_precision():
    threshold = torch.tensor(1.0010, dtype=torch.float64)  # in bfloat16: 1
    assert above(torch.ones(1, 1).bfloat16(), threshold - 0.002).indices.tolist() == [0]
    assert above(torch.full((1, 1), 1.0078125).bfloat16(), threshold + 0.0067).indices.tolist() == [0]
    assert above(torch.full((1, 1), 1.0078125).bfloat16(), threshold + 0.0070).indices.tolist() == []


def test_the_strongest_row_of_each_latent_is_found_and_goes_first():
    matrix = torch.tensor([[0.1, -5.0, 2.0], [0.3, -1.0, 9.0]])
    found = strongest_rows(_blocks(matrix[:, :2], 1), torch.tensor([0, 1]))
    assert [part.tolist() for part in found[:2]] == [[1], [0]]  # latent 1 is positive nowhere
    code, first = top_of_batch(_blocks(matrix), 2, turn=torch.tensor([0, 1]))
    torch.testing.assert_close(code.to_dense(3), torch.tensor([[0.0, 0.0, 0.0], [0.3, 0.0, 9.0]]))
    assert first.among(code.places(3), 3).tolist() == [True, False]


@pytest.mark.parametrize("at_once", [3, 40, 75])
def test_what_goes_first_counts_and_the_rest_are_the_largest_of_the_others(at_once):
    matrix, turn = _matrix(75, 30), torch.tensor([29, 4, 17, 3])
    matrix[:, 4] -= 10.0  # positive nowhere
    matrix[[3, 50], 17] = 9.0  # as strong in two rows: the first of them
    found = strongest_rows(_blocks(matrix[:, turn], at_once), turn)
    rows = {latent: int(matrix[:, latent].argmax()) for latent in (29, 17, 3)}
    assert dict(zip(found.latents.tolist(), found.rows.tolist(), strict=True)) == rows
    code, first = top_of_batch(_blocks(matrix, at_once), 20, turn=turn)
    assert [part.tolist() for part in first] == [part.tolist() for part in found]
    others = matrix.clone()
    others[found.rows, found.latents] = -torch.inf
    wanted = torch.zeros(75 * 30, dtype=torch.bool)
    wanted[others.flatten().argsort(descending=True)[:17]] = True
    wanted[found.rows * 30 + found.latents] = True
    assert torch.equal(code.to_dense(30), matrix * wanted.view(75, 30))


@pytest.mark.parametrize("kind", ["TopK", "BatchTopK", "MatryoshkaBatchTopK"])
@pytest.mark.parametrize("k", [2, 3])
def test_minfire_keeps_the_budget_and_lets_all_in_turn_fire(kind, k):
    dictionary = make(kind, k=k)
    u = dictionary.normalise(rows(40))
    for step in range(5):
        turn = whose_turn(step, 100, dictionary.n_latents, 40.0 * k, u.device)
        code = dictionary.training_code(u, turn=turn)
        assert len(code.latents.values) == 40 * k
        can = turn[(dictionary.pre_acts(code.inputs, turn) > 0).any(0)]
        # Of one row TopK may be asked for more than k.
        if kind != "TopK":
            assert set(can.tolist()) <= set(code.latents.indices[code.latents.values > 0].tolist())


def test_turns_go_round_and_end_before_the_run():
    device = torch.device("cpu")
    seen = [whose_turn(step, 100, 10, 12.0, device).tolist() for step in range(4)]
    assert seen == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 0, 1]]
    assert whose_turn(89, 100, 10, 12.0, device) is not None
    assert whose_turn(90, 100, 10, 12.0, device) is None
    assert whose_turn(0, 100, 10, 1e9, device).tolist() == list(range(10))


def _alike(mine, whole, group):
    """The ranks' entries, one after the other, are those of one rank."""
    found = group.gather(mine.detach())
    assert torch.equal(found != 0, whole != 0)
    torch.testing.assert_close(found, whole.detach())


def _by_ranks(world):
    torch.distributed.init_process_group("gloo")
    group = Group.of_training(torch.device("cpu"))
    matrix = _matrix(4 * world, 20)
    uneven = matrix.flatten().sort(descending=True).values.view_as(matrix)  # the first rank has the largest
    for of_all in (matrix, uneven, matrix.clamp_max(0.0).sub(1.0)):
        for count in (0, 1, 7, 37, 10_000):
            whole, _ = top_of_batch(_blocks(of_all), count)
            part, _ = top_of_batch(_blocks(group.share(of_all)), count, group)
            found, wanted = (code.to_dense(20).flatten() for code in (part, whole))
            if of_all is matrix or of_all is uneven:
                _alike(found.view(-1, 20), wanted.view(-1, 20), group)
            else:  # of many that are equal, so many
                assert torch.equal(group.gather(found).sort().values, wanted.sort().values)
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        _strongest(matrix.to(dtype), group)
    _strongest(torch.cat([matrix[:4]] * world), group)  # the same rows on every rank: one of them alone
    _kinds(group)
    _resampling(group)


def _strongest(matrix, group):
    latents = torch.tensor([0, 3, 19, 7])
    rows, of, _, of_all = strongest_rows(_blocks(matrix[:, latents]), latents)
    mine, of_mine, _, known = strongest_rows(_blocks(group.share(matrix)[:, latents]), latents, group)
    assert known == of_all == len(rows)
    n_rows = len(matrix) // group.world
    found = group.gather(torch.stack([mine + group.rank * n_rows, of_mine], 1))
    assert sorted(found.tolist()) == sorted(torch.stack([rows, of], 1).tolist())


def _kinds(group):
    for kind in ("TopK", "BatchTopK", "ReLU", "Gated", "JumpReLU"):
        for turn in (None, torch.arange(6)):
            dictionary = make(kind) if kind != "BatchTopK" else make(kind, k=0.29)
            u = dictionary.normalise(rows(50 * group.world))
            whole, mine = (
                dictionary.training_code(x, g, turn) for x, g in ((u, ALONE), (group.share(u), group))
            )
            assert mine.latents.n_rows == 50
            _alike(mine.latents.to_dense(30), whole.latents.to_dense(30), group)
            for name in dictionary.news:
                news = mine.news[name].clone()
                group.sum_(news)
                torch.testing.assert_close(news / group.world, whole.news[name])


def _resampling(group):
    dictionary, alone = make("JumpReLU"), make("JumpReLU")
    residual = rows(5 * group.world)
    for one, mine, by in ((dictionary, group.share(residual), group), (alone, residual, ALONE)):
        counters = DeadLatents(30, 10)
        counters.tokens_since_fired[[4, 9]] = 11
        assert resample(one, counters, 10, mine, torch.optim.Adam(one.parameters()), 5, by) == 2
    for name, parameter in dictionary.named_parameters():
        assert torch.equal(parameter, dict(alone.named_parameters())[name]), name


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_choose_as_one_would(world):
    outcomes = run_ranks(world, _by_ranks, world)
    assert outcomes == [None] * world, "\n".join(map(str, outcomes))
