"""The learning rate rises, stays, falls."""

import pytest

from sae.training.schedules import learning_rate_for, warmup_then_decay


def test_schedule_by_hand():
    factors = [warmup_then_decay(s, warmup_steps=4, max_steps=20, decay_share=0.25) for s in range(21)]
    assert factors[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert factors[15:] == pytest.approx([1.0, 0.8, 0.6, 0.4, 0.2, 0.0])


def test_no_warmup_and_no_decay_is_constant():
    assert {warmup_then_decay(s, warmup_steps=0, max_steps=9, decay_share=0.0) for s in range(9)} == {1.0}


def test_rate_falls_with_the_root_of_the_width():
    assert learning_rate_for(2**14, 100_000) == pytest.approx(2e-4)
    assert learning_rate_for(2**12, 1_000_000) == pytest.approx(4e-4)


def test_rate_is_higher_the_shorter_the_run_up_to_five_times():
    long, eighth, shortest, none = (learning_rate_for(2**14, n) for n in (100_000, 12_500, 100, 0))
    assert eighth == pytest.approx(2 * long) and shortest == none == pytest.approx(5 * long)
