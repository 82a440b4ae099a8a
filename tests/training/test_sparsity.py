"""The control of a penalty's weight: it finds the level at which L0 is as asked."""

import pytest
import torch

from sae.training.sparsity import SparsityControl

PLANTS = {
    "flat": lambda c: 60.0 / (1 + c) ** 0.5,
    "steep": lambda c: 40.0 / (1 + (c / 0.03) ** 2),
    "hyperbola": lambda c: 0.5 / c,
    "threshold-like": lambda c: 96.0 * torch.exp(-3.0 * c**0.5),
}


@pytest.mark.shapes_unchecked
@pytest.mark.parametrize("plant", PLANTS)
@pytest.mark.parametrize("target", [2.0, 12.0])
@pytest.mark.parametrize("lag", [0.0, 0.9])
def test_l0_reaches_its_target_and_stays(plant, target, lag):
    control = SparsityControl(target_l0=target)
    l0, tail = PLANTS[plant](control.coefficient(0.0)), []
    for step in range(4000):
        l0 = lag * l0 + (1 - lag) * PLANTS[plant](control.coefficient(0.0))
        control.update(l0)
        if step >= 3500:
            tail.append(float(l0))
    assert max(abs(value / target - 1) for value in tail) < 0.02, (min(tail), max(tail))


def test_a_fixed_coefficient_rises_and_stays():
    control = SparsityControl(fixed=2.0, warms_up_for=0.1)
    control.update(torch.tensor(50.0))
    found = [float(control.coefficient(progress)) for progress in (0.0, 0.05, 0.1, 0.7, 1.0)]
    assert found == pytest.approx([0.0, 1.0, 2.0, 2.0, 2.0])
    assert float(SparsityControl(fixed=2).coefficient(0.0)) == 2.0


@pytest.mark.parametrize("l0", [float("nan"), 0.0, float("inf")])
def test_no_l0_makes_the_coefficient_other_than_finite(l0):
    control = SparsityControl(target_l0=5.0)
    before = float(control.coefficient(0.0))
    for _ in range(100):
        control.update(torch.tensor(l0))
    after = float(control.coefficient(0.0))
    assert after == before if l0 != l0 else (after > before) == (l0 > 5)
    assert 0 < after < float("inf")
