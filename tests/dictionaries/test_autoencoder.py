"""Scaling, norms and gradients of sparse autoencoders."""

import pytest
import torch

from sae.dictionaries import TopK
from sae.errors import InputError


@pytest.fixture
def dictionary():
    return TopK(6, 10, 3)


def test_encoder_starts_as_the_decoders_transpose(dictionary):
    assert torch.equal(dictionary.W_enc, dictionary.W_dec.T)
    assert dictionary.W_enc.data_ptr() != dictionary.W_dec.data_ptr()


def test_directions_start_uniform_on_the_sphere():
    directions = TopK(32, 4096, 1).directions
    assert directions.mean(0).norm() < 0.05  # both signs: the mean of 4,096 such rows has norm 1/64


def test_b_dec_starts_at_the_data_mean(dictionary):
    mean = torch.arange(6.0)
    dictionary.set_input_statistics(mean, float(mean.square().sum()) + 24.0)
    torch.testing.assert_close(dictionary.saved_tensors()["b_dec"], mean)


def test_normalised_inputs_have_mean_zero_and_mean_squared_norm_d(dictionary):
    x = 100.0 + 7.0 * torch.randn(5000, 6)
    dictionary.set_input_statistics(x.mean(0), float(x.square().sum(1).mean()))
    u = dictionary.normalise(x)
    assert u.mean(0).abs().max() < 1e-3
    assert u.square().sum(1).mean().item() == pytest.approx(6.0, rel=1e-3)


def test_rows_that_do_not_vary_are_an_error(dictionary):
    with pytest.raises(InputError, match="do not vary"):
        dictionary.set_input_statistics(torch.ones(6), 6.0)


def test_parallel_gradient_is_removed_and_unit_norm_restored(dictionary):
    dictionary.W_dec.grad = torch.randn(10, 6)
    dictionary.remove_parallel_gradient()
    assert (dictionary.W_dec.grad * dictionary.W_dec).sum(1).abs().max() < 1e-6
    with torch.no_grad():
        dictionary.W_dec.mul_(3.0)
    dictionary.constrain()
    torch.testing.assert_close(dictionary.W_dec.norm(dim=1), torch.ones(10))


@pytest.mark.parametrize("k", [0, 11, -1])
def test_k_out_of_range_is_an_error(k):
    with pytest.raises(InputError, match=rf"`k` must be in \[1, n_latents=10\], got k={k}; lower k or raise"):
        TopK(6, 10, k)


@torch.no_grad()
def test_topk_fires_exactly_k_where_pre_activations_are_positive_and_keeps_their_values(dictionary):
    dictionary.b_enc.fill_(100.0)
    x = torch.randn(4, 6)
    latents, pre_acts = dictionary.encode(x), x @ dictionary.W_enc + dictionary.b_enc
    assert (latents > 0).sum(1).tolist() == [3] * 4
    torch.testing.assert_close(latents[latents > 0], pre_acts[latents > 0])
    assert (pre_acts[latents == 0].view(4, 7).amax(1) <= latents.topk(3).values[:, -1]).all()


def test_topk_never_fires_on_negative_pre_activations(dictionary):
    with torch.no_grad():
        dictionary.b_enc.fill_(-100.0)
    assert dictionary.encode(torch.randn(4, 6)).abs().max() == 0
