"""New lives for dead latents: what resampling changes, and which way brings back which kinds."""

import pytest
import torch
from support.kinds import N, make, rows
from support.laws import KINDS

from sae.errors import InputError
from sae.training.dead_latents import DeadLatents
from sae.training.learner import Learner
from sae.training.recipe import Recipe
from sae.training.revival import check_ways, resample

DEAD = [1, 8, 20]


def _stepped(dictionary):
    """An optimiser whose moments are nowhere zero."""
    optimizer = torch.optim.Adam(dictionary.parameters(), lr=1e-3)
    for parameter in dictionary.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    dictionary.constrain()
    return optimizer


def _counters(n_latents=N):
    counters = DeadLatents(n_latents, dead_after_tokens=10)
    counters.tokens_since_fired[:] = 9
    counters.tokens_since_fired[DEAD] = 10
    counters.dead[DEAD] = True
    return counters


@pytest.mark.parametrize(
    ("kind", "whiten"),
    [(kind, w) for kind in KINDS for w in (False, True) if not (w and kind == "MatchingPursuit")],
)
@torch.no_grad()
def test_resampling_changes_the_dead_alone(kind, whiten):
    dictionary = make(kind, whiten=whiten)
    optimizer, counters = torch.enable_grad()(_stepped)(dictionary), _counters()
    before = {name: p.clone() for name, p in dictionary.named_parameters()}
    residual = rows(50)
    assert resample(dictionary, counters, 10, residual, optimizer, seed=1) == 3
    living = torch.ones(N, dtype=torch.bool)
    living[DEAD] = False
    for name, parameter in dictionary.named_parameters():
        state = optimizer.state[parameter]
        if name == "b_dec":
            assert torch.equal(parameter, before[name]) and (state["exp_avg"] != 0).all()
            continue
        assert torch.equal(parameter[living], before[name][living]), name
        for moment in ("exp_avg", "exp_avg_sq"):
            assert (state[moment][living] != 0).all() and (state[moment][DEAD] == 0).all(), name
    assert counters.tokens_since_fired.tolist() == [0 if i in DEAD else 9 for i in range(N)]
    assert not counters.dead.any() and len(counters.ids) == 0
    cosines = dictionary.W_dec[DEAD] @ torch.nn.functional.normalize(residual, dim=1).T
    torch.testing.assert_close(cosines.amax(1), torch.ones(3).double())
    assert len(set(cosines.argmax(1).tolist())) == 3


@torch.no_grad()
def test_where_latents_are_as_many_as_dimensions_b_dec_keeps_its_moments():
    dictionary = type(make("TopK"))(N, N, 2).double()
    optimizer = torch.enable_grad()(_stepped)(dictionary)
    assert resample(dictionary, _counters(), 10, torch.randn(50, N).double(), optimizer, seed=1) == 3
    assert (optimizer.state[dictionary.b_dec]["exp_avg"] != 0).all()


@torch.no_grad()
def test_badly_reconstructed_rows_are_drawn_in_any_order_of_rows():
    residual = rows(40) * 1e-3
    residual[[7, 30, 11]] *= 1e6
    for order in (torch.arange(40), torch.randperm(40)):
        dictionary = make("TopK")
        optimizer = torch.enable_grad()(_stepped)(dictionary)
        resample(dictionary, _counters(), 10, residual[order], optimizer, seed=4)
        found = dictionary.W_dec[DEAD]
        expected = torch.nn.functional.normalize(residual[[7, 30, 11]], dim=1)
        torch.testing.assert_close((found @ expected.T).amax(1), torch.ones(3).double())
        if order[0] == 0:
            first = found
    torch.testing.assert_close(found, first)


def test_after_a_step_that_is_not_finite_nothing_is_resampled_or_remembered():
    for kind in KINDS:
        dictionary = make(kind)
        learner = Learner(dictionary, Recipe(revival=("resample",), resample_every=1)).double()
        learner.plan(100, 40)
        learner.dead_latents.tokens_since_fired[DEAD] = 10_000
        optimizer = torch.optim.Adam(dictionary.parameters())
        u = dictionary.normalise(rows(40))
        u[3] = float("nan")
        before = {name: b.clone() for name, b in learner.state_dict().items() if "dead_latents" not in name}
        learner.loss(u, 0).total.backward()
        flags = learner.arrive(0)
        assert flags[2] > 0 and flags[3] > 0
        optimizer.found_inf = torch.tensor(1.0)
        learner.settle(0, optimizer)
        for name, value in before.items():
            torch.testing.assert_close(learner.state_dict()[name], value, msg=f"{kind} {name}")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ReLU", "Gated"])
def test_the_kinds_own_way_of_revival_brings_latents_back(kind):
    """Half of the latents pushed below what any row reaches: more of them fire than without revival."""

    def dead_after(ways):
        dictionary = make(kind)
        with torch.no_grad():
            dictionary.b_enc[::2] -= 1.5
        learner = Learner(dictionary, Recipe(revival=ways, dead_after_tokens=400)).double()
        learner.plan(400, 200)
        optimizer = torch.optim.Adam(dictionary.parameters(), lr=3e-3)
        u = dictionary.normalise(rows(2000))
        for step in range(400):
            optimizer.zero_grad()
            learner.loss(u[torch.arange(step * 200, step * 200 + 200) % 2000], step).total.backward()
            learner.arrive(step)
            optimizer.step()
            learner.settle(step, optimizer)
        return float((learner.dead_latents.tokens_since_fired >= 400).float().mean())

    without, revived = dead_after(()), dead_after(None)
    assert without > 0.3 and dead_after(("auxk",)) > 0.3
    assert revived <= without / 2


@pytest.mark.parametrize("ways", [("auxk", "auxk"), ("magic",)])
def test_ways_that_do_not_exist_or_come_twice_are_errors(ways):
    with pytest.raises(
        InputError, match="`revival` must list different ones of auxk, pre_act, resample, minf"
    ):
        check_ways(ways)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("auxk_coefficient", float("nan")),
        ("pre_act_coefficient", -1.0),
        ("auxk_coefficient", float("inf")),
        ("resample_every", 0),
    ],
)
def test_recipes_out_of_range_are_errors(name, value):
    with pytest.raises(InputError, match=f"`{name}` must be"):
        Recipe(**{name: value}).check()
