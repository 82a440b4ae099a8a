"""A quiet step never asks the device for a number: on a GPU that would make the host wait for it."""

import pytest
import torch

from sae.dictionaries import BatchTopK, TopK
from sae.ops import encoder
from sae.training.divergence import clip_gradients
from sae.training.learner import Learner
from sae.training.recipe import Recipe


def _steps_without_numbers(dictionary):
    """Two steps where tensors have shapes alone: whatever asks for a number of theirs fails."""
    learner = Learner(dictionary, Recipe(l0_start=1.0))
    learner.plan(1000, 64)
    assert len(learner.dead_latents.ids) == 0
    learner = learner.to("meta")
    for step in range(2):
        losses = learner.loss(dictionary.normalise(torch.empty(64, 16, device="meta")), step)
        losses.total.backward()
        learner.arrive(step)
        clip_gradients(list(dictionary.parameters()), 1.0, None)
        learner.settle(step, torch.optim.SGD(dictionary.parameters()))


def test_a_step_of_topk_waits_for_nothing(monkeypatch):
    monkeypatch.setattr(encoder, "_dtype", lambda v: v.dtype)  # there is no autocast without numbers
    _steps_without_numbers(TopK(16, 128, k=4))


def test_this_would_be_seen(monkeypatch):
    """BatchTopK's number of entries to a row is known only when it has been counted."""
    monkeypatch.setattr(encoder, "_dtype", lambda v: v.dtype)
    with pytest.raises(NotImplementedError, match="nonzero"):
        _steps_without_numbers(BatchTopK(16, 128, k=4))
