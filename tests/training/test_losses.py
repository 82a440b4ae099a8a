"""The loss terms, by hand and against a dense reference."""

import pytest
import torch

from sae.dictionaries import TopK
from sae.training.losses import auxk_loss

D, N, K = 8, 20, 3


@pytest.fixture
def dictionary():
    dictionary = TopK(D, N, K).double()
    with torch.no_grad():
        dictionary.b_dec.normal_()
        dictionary.b_enc.normal_()
    return dictionary


def _dense_auxk(dictionary, u, residual, dead, k):
    """The formula, with autograd through everything."""
    pre_acts = u @ dictionary.W_enc + dictionary.b_enc
    of_dead = torch.full_like(pre_acts, -torch.inf)
    of_dead[:, dead] = pre_acts[:, dead]
    chosen = torch.zeros_like(pre_acts).scatter(1, of_dead.topk(k).indices, 1.0)
    e_hat = (pre_acts.relu() * chosen) @ dictionary.W_dec
    return (residual - e_hat).square().sum() / residual.square().sum()


@pytest.mark.parametrize("dead", [[1, 4, 7, 11, 13, 19], [2]])
def test_auxk_equals_the_dense_formula_with_all_gradients_and_non_zero_b_dec(dictionary, dead):
    u, residual, dead = torch.randn(30, D).double(), torch.randn(30, D).double(), torch.tensor(dead)
    ours = auxk_loss(dictionary, residual, dictionary.training_code(u), dead, residual.square().mean())
    reference = _dense_auxk(dictionary, u, residual, dead, min(len(dead), D // 2))
    torch.testing.assert_close(ours, reference)
    weights = (dictionary.W_enc_rows, dictionary.b_enc, dictionary.W_dec)
    for a, b in zip(torch.autograd.grad(ours, weights), torch.autograd.grad(reference, weights), strict=True):
        torch.testing.assert_close(a, b)


def test_auxk_gradient_reaches_the_encoder_of_dead_latents_only(dictionary):
    u, dead = torch.randn(30, D).double(), torch.tensor([3, 5])
    auxk_loss(dictionary, u, dictionary.training_code(u), dead, u.square().mean()).backward()
    for grad in (dictionary.W_enc_rows.grad, dictionary.W_dec.grad):
        assert (grad.abs().sum(1) > 0).nonzero().flatten().tolist() == [3, 5]
    assert dictionary.b_dec.grad is None


def test_auxk_does_not_push_the_living_through_the_residual(dictionary):
    u = torch.randn(30, D).double()
    code = dictionary.training_code(u)
    residual = u - dictionary.decode_normalised(code.latents)
    auxk_loss(dictionary, residual, code, torch.tensor([0]), torch.ones(()).double()).backward()
    assert (dictionary.W_dec.grad.abs().sum(1) > 0).sum() == 1
