"""Counting tokens since each latent fired."""

import torch

from sae.ops.sparse import from_dense
from sae.training.dead_latents import DeadLatents, count_firings


def _code(*firing, rows=4):
    latents = torch.zeros(rows, 3)
    latents[0, list(firing)] = 1.0
    return from_dense(latents)


def _update(tracker, code, step):
    tracker.update(count_firings(code, 3) > 0, code.n_rows, step)


def test_counters_by_hand():
    tracker = DeadLatents(3, dead_after_tokens=8, refresh_every=1)
    for step, firing in enumerate([(0, 1), (0,), (0,)]):
        _update(tracker, _code(*firing), step)
    assert tracker.tokens_since_fired.tolist() == [0, 8, 12]
    assert tracker.ids.tolist() == [1, 2]
    _update(tracker, _code(2), 3)
    assert tracker.ids.tolist() == [1]
    assert tracker.fraction() == 1 / 3


def test_entries_equal_to_zero_do_not_count_as_firing():
    tracker = DeadLatents(3, dead_after_tokens=4, refresh_every=1)
    code = _code(0, 1)
    _update(tracker, code._replace(values=torch.tensor([1.0, 0.0])), 0)
    assert tracker.tokens_since_fired.tolist() == [0, 4, 4]


def test_list_of_dead_is_refreshed_on_its_own_beat_and_survives_a_resume():
    tracker = DeadLatents(3, dead_after_tokens=4, refresh_every=2)
    _update(tracker, _code(0), 0)
    assert tracker.ids.tolist() == []
    _update(tracker, _code(0), 1)
    assert tracker.ids.tolist() == [1, 2]
    resumed = DeadLatents(3, dead_after_tokens=4, refresh_every=2)
    resumed.load_state_dict(tracker.state_dict())
    _update(resumed, _code(0, 1), 2)
    assert resumed.ids.tolist() == [1, 2]  # not yet refreshed
