"""What a dictionary begins with: whitened inputs, directions of the data, rates, earlier weights."""

import json

import pytest
import torch
from support.kinds import D, K, N, make, moments, rows
from support.laws import KINDS

import sae
from sae.dictionaries import JumpReLU, ReLU, TopK
from sae.errors import InputError
from sae.training.beginning import Beginning, start_in_subspace, warm_start
from sae.training.recipe import Recipe

PENALISED = ("ReLU", "Gated", "JumpReLU")


class _Source:
    """Rows as a datamodule gives them."""

    batch_size, d_model = 10, D

    def __init__(self, x):
        self.x, self.moments = x, moments(x)

    def first_rows(self, n):
        return self.x[:n].float()


def _plain(kind, **arguments):
    torch.manual_seed(1)
    if not arguments:
        arguments = {"target_l0": 3.0} if kind in PENALISED else {"k": K}
    return type(make(kind))(D, N, **arguments).double()


@torch.no_grad()
def test_whitened_the_encoder_sees_equal_variances():
    x = rows(5000)
    dictionary = _plain("TopK")
    Beginning(whiten=True).begin(dictionary, _Source(x), Recipe(l0_start=1.0))
    v = dictionary.encoder_input(dictionary.normalise(x))
    torch.testing.assert_close(torch.cov(v.T, correction=0), torch.eye(D).double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dictionary.W_enc_rows.norm(dim=1), torch.ones(N).double())


@torch.no_grad()
def test_directions_without_variance_are_not_blown_up():
    x = rows(500)
    x[:, 0] = 5.0
    dictionary = _plain("TopK")
    Beginning(whiten=True).begin(dictionary, _Source(x), Recipe(l0_start=1.0))
    assert torch.linalg.eigvalsh(dictionary.whitening).max() < 32 / 0.9**0.5
    assert dictionary(x).x_hat.isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_started_in_the_subspace_directions_lie_there_and_vary_as_the_data(kind):
    basis = torch.linalg.qr(torch.randn(D, 3).double()).Q
    x = torch.randn(4000, 3).double() * torch.tensor([5.0, 1.0, 0.2]).double() @ basis.T
    arguments = {"target_l0": 3.0} if kind in PENALISED else {"k": K}
    dictionary = type(_plain(kind))(D, 3000, **arguments).double()
    start_in_subspace(dictionary, moments(x))
    outside = dictionary.W_dec - dictionary.W_dec @ basis @ basis.T
    assert outside.abs().max() < 1e-4
    torch.testing.assert_close(dictionary.W_dec.norm(dim=1), torch.ones(3000).double())
    if kind != "MatchingPursuit":
        torch.testing.assert_close(dictionary.W_enc, dictionary.W_dec.T)
    spread = (dictionary.W_dec @ basis).square().mean(0)
    assert spread[0] > 3 * spread[1] > 9 * spread[2] and dictionary.W_dec.mean(0).norm() < 0.1


@pytest.mark.parametrize("kind", PENALISED)
@pytest.mark.parametrize("target", [0.5, 3.0, N])
@pytest.mark.parametrize("whiten", [False, True])
@torch.no_grad()
def test_latents_begin_at_equal_rates_that_add_up_to_the_target(kind, target, whiten):
    x = rows(3000) - 5
    dictionary = _plain(kind, target_l0=target)
    Beginning(whiten=whiten).begin(dictionary, _Source(x.float().double()), Recipe(l0_start=1.0))
    fires = dictionary.encode(x.float().double()) > 0
    if target < N:
        torch.testing.assert_close(fires.double().sum(1).mean().item(), target, rtol=0.02, atol=0.0)
        assert fires.sum(0).max() - fires.sum(0).min() <= 1


@pytest.mark.parametrize(
    ("kind", "whiten"),
    [(kind, w) for kind in KINDS for w in (False, True) if not (w and kind == "MatchingPursuit")],
)
@torch.no_grad()
def test_a_warm_start_goes_on_with_the_same_outputs(kind, whiten, tmp_path):
    earlier, x = make(kind), rows(200, seed=5)
    sae.save(earlier, tmp_path)
    dictionary = _plain(kind)
    Beginning(whiten=whiten, init_from=str(tmp_path)).begin(
        dictionary, _Source(rows(300, seed=8) * 2 - 3), Recipe(l0_start=1.0)
    )
    one, other = earlier(x), dictionary(x)
    assert torch.equal(one.latents.indices, other.latents.indices)
    torch.testing.assert_close(one.x_hat, other.x_hat, rtol=1e-8, atol=1e-8)
    assert dictionary.input_scale != 1


@pytest.mark.parametrize(
    ("other", "told"),
    [
        (lambda: TopK(D, N + 1, 2), r"\('TopK', 7, 31\), here \('JumpReLU', 7, 30\)"),
        (lambda: TopK(D, N, 2), r"\('TopK', 7, 30\), here"),
        (lambda: JumpReLU(D + 1, N, target_l0=2), r"\('JumpReLU', 8, 30\), here"),
        (lambda: sae.PCA(D).fit([rows(50).float()], moments(rows(50))), r"\('PCA', 7, "),
    ],
)
def test_another_kind_or_width_is_an_error(other, told, tmp_path):
    sae.save(other(), tmp_path)
    with pytest.raises(InputError, match="same kind and widths: there .* is " + told):
        warm_start(_plain("JumpReLU"), str(tmp_path))


def test_a_damaged_or_missing_dictionary_is_an_error(tmp_path):
    with pytest.raises(InputError, match="no dictionary in"):
        Beginning(init_from=str(tmp_path)).check()
    sae.save(ReLU(D, N, target_l0=2), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"kind": "JumpReLU"}))
    with pytest.raises(InputError, match="does not match its config.json: 'threshold'"):
        warm_start(_plain("JumpReLU"), str(tmp_path))
    (tmp_path / "config.json").write_text(json.dumps({"format": config["format"], "kind": "JumpReLU"}))
    with pytest.raises(InputError, match="same kind and widths"):
        warm_start(_plain("JumpReLU"), str(tmp_path))


def test_an_unknown_start_is_an_error():
    with pytest.raises(InputError, match="`start` must be sphere or subspace, got 'cube'"):
        beginning = Beginning()
        object.__setattr__(beginning, "start", "cube")
        beginning.check()
