"""Floating-point operations per token."""

from sae.training.flops import training_flops


def test_training_flops_by_hand():
    assert training_flops(d_model=10, n_latents=100, entries=3, revived=5) == (2000 + 240, 400)
