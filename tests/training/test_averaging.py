"""Running means of weights."""

import torch
from support.kinds import make

from sae.training.averaging import WeightAverages


@torch.no_grad()
def test_means_by_hand_and_given_back():
    dictionary = make("JumpReLU")
    averages = WeightAverages(dictionary, decay=0.5).double()
    expected, directions = dictionary.b_dec.clone(), dictionary.W_dec.clone()
    for step in range(1, 40):
        dictionary.b_dec += 1.0
        averages.update(dictionary)
        kept = min(0.5, (1 + step) / (10 + step))
        expected = kept * expected + (1 - kept) * dictionary.b_dec
    own = {name: parameter.clone() for name, parameter in dictionary.named_parameters()}
    with averages.used_in(dictionary):
        torch.testing.assert_close(dictionary.b_dec, expected)
        torch.testing.assert_close(dictionary.W_dec, directions)
    for name, parameter in dictionary.named_parameters():
        assert torch.equal(parameter, own[name]), name


@torch.no_grad()
def test_means_of_directions_are_brought_to_unit_norm():
    dictionary = make("TopK")
    averages = WeightAverages(dictionary, decay=0.9).double()
    for _ in range(5):
        dictionary.W_dec.copy_(torch.nn.functional.normalize(torch.randn_like(dictionary.W_dec), dim=1))
        averages.update(dictionary)
    assert averages.W_dec.norm(dim=1).max() < 0.999
    averages.copy_into(dictionary)
    torch.testing.assert_close(dictionary.W_dec.norm(dim=1), torch.ones(30).double())


@torch.no_grad()
def test_a_failure_within_gives_the_weights_back():
    dictionary = make("TopK")
    averages = WeightAverages(dictionary, decay=0.9).double()
    own = dictionary.b_enc.add_(1.0).clone()
    try:
        with averages.used_in(dictionary):
            assert not torch.equal(dictionary.b_enc, own)
            raise RuntimeError
    except RuntimeError:
        assert torch.equal(dictionary.b_enc, own)
