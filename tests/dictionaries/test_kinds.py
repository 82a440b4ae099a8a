"""What each kind promises by itself, by hand: thresholds, equal twins, and arguments out of range."""

import pytest
import torch
from support.kinds import make, rows

from sae.dictionaries import BatchTopK, Gated, JumpReLU, MatchingPursuit, MatryoshkaBatchTopK, ReLU, TopK
from sae.errors import InputError
from sae.training.learner import Learner
from sae.training.recipe import Recipe


def _identity(kind, **arguments):
    """Two latents that are the two inputs."""
    dictionary = kind(2, 2, **arguments)
    with torch.no_grad():
        dictionary.W_dec.copy_(torch.eye(2))
        dictionary.W_enc_rows.copy_(torch.eye(2))
    return dictionary


def _hears(dictionary, u):
    dictionary.hear(dictionary.training_code(u).news)


def test_the_threshold_takes_a_share_of_the_smallest_that_fired():
    dictionary = _identity(BatchTopK, k=1, threshold_rate=0.25)
    u = torch.tensor([[5.0, 4.0], [1.0, -1.0]])  # two of four: 5 and 4
    _hears(dictionary, u)
    assert dictionary.threshold.item() == 0.25 * 4.0  # from 0, a quarter of the way to 4
    assert dictionary.fires_above.item() == 4.0  # in use: as if it had always been there
    _hears(dictionary, -u.abs())
    assert dictionary.threshold.item() == 1.0  # nothing fired
    _hears(dictionary, u / 2)
    assert dictionary.threshold.item() == pytest.approx(1.0 + 0.25 * (2.0 - 1.0))
    assert dictionary.fires_above.item() == pytest.approx((0.75 * 4 + 2) / 1.75)


def test_the_threshold_is_of_float64_under_bfloat16_too():
    dictionary = make("BatchTopK").float()
    with torch.autocast("cpu", torch.bfloat16):
        code = dictionary.training_code(dictionary.normalise(rows(40).float()))
        before = dictionary.threshold.clone()
        dictionary.hear(code.news)
    assert dictionary.threshold.dtype == dictionary.weight.dtype == torch.float64
    smallest = code.latents.values[code.latents.values > 0].min().double()
    torch.testing.assert_close(dictionary.threshold, before + 0.01 * (smallest - before), rtol=1e-12, atol=0)


@torch.no_grad()
def test_in_use_batchtopk_is_a_jumprelu_of_one_threshold():
    for kind in ("BatchTopK", "MatryoshkaBatchTopK"):
        dictionary, x = make(kind), rows(300, seed=5)
        twin = dictionary.as_jumprelu()
        assert type(twin) is JumpReLU and (twin.threshold == twin.threshold[0]).all()
        latents = dictionary.encode(x)
        pre_acts = dictionary.pre_acts(dictionary.normalise(x)) / dictionary.input_scale
        level = dictionary.fires_above / dictionary.input_scale
        torch.testing.assert_close(latents, torch.where(pre_acts > level, pre_acts, 0.0))
        torch.testing.assert_close(twin.encode(x), latents, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(twin(x).x_hat, dictionary(x).x_hat, rtol=1e-6, atol=1e-6)


def _loss_and_gradients(dictionary):
    learner = Learner(dictionary, Recipe(revival=())).double()
    learner.plan(100, 50)
    loss = learner.loss(dictionary.normalise(rows(50)), 60).total
    loss.backward()
    return [loss, *(parameter.grad for parameter in dictionary.parameters())]


def test_matryoshka_of_one_level_is_batchtopk():
    one, other = make("BatchTopK", k=3), make("MatryoshkaBatchTopK", k=3, widths=[30])
    other.load_state_dict(one.state_dict())
    for a, b in zip(_loss_and_gradients(one), _loss_and_gradients(other), strict=True):
        torch.testing.assert_close(a, b)


def test_the_widest_level_is_the_plain_reconstruction():
    dictionary = make("MatryoshkaBatchTopK", k=3, widths=[4, 11])
    assert dictionary.widths == (4, 11, 30)  # the whole dictionary is always a level
    u = dictionary.normalise(rows(50))
    code = dictionary.training_code(u)
    made = dictionary.reconstruct(u, code)
    torch.testing.assert_close(u - made.residual, dictionary.decode_normalised(code.latents))
    dense, losses = code.latents.to_dense(30), []
    for width in dictionary.widths:
        prefix = dense[:, :width] @ dictionary.W_dec[:width] + dictionary.b_dec
        losses.append((u - prefix).square().mean())
    torch.testing.assert_close(made.loss, torch.stack(losses).mean())


@torch.no_grad()
def test_at_its_threshold_a_latent_does_not_fire_yet():
    dictionary = _identity(JumpReLU, target_l0=1)
    dictionary.threshold.copy_(torch.tensor([1.0, 2.0]))
    x = torch.tensor([[1.0, 2.0], [1.5, 1.5], [0.5, 2.5]])
    assert dictionary.encode(x).tolist() == [[0.0, 0.0], [1.5, 0.0], [0.0, 2.5]]


@torch.no_grad()
def test_where_the_gate_is_shut_nothing_comes_through():
    dictionary = _identity(Gated, target_l0=1)
    dictionary.b_enc.copy_(torch.tensor([-1.0, 0.0]))
    dictionary.r_mag.copy_(torch.tensor([2.0, 1.0]).log())
    dictionary.b_mag.copy_(torch.tensor([5.0, -1.5]))
    x = torch.tensor([[1.0, -0.1], [1.5, 1.0]])
    torch.testing.assert_close(dictionary.encode(x), torch.tensor([[0.0, 0.0], [2 * 1.5 + 5, 0.0]]))
    # Of two open gates of 0.5 and 1 the penalty is their sum; over two rows the mean.
    assert dictionary.penalty(dictionary.training_code(x)).item() == pytest.approx((0.5 + 1.0) / 2)


BAD = [
    (TopK, {}, "`k` must be given, the latents per row"),
    (TopK, {"k": 31}, r"`k` must be in \[1, n_latents=30\], got k=31"),
    (TopK, {"k": 0}, r"`k` must be in \[1, n_latents=30\], got k=0"),
    (MatchingPursuit, {"k": 31}, r"`k` must be in \[1, n_latents=30\], got k=31"),
    (
        MatchingPursuit,
        {"k": 3, "residual_threshold": 1.0},
        r"`residual_threshold` must be in \[0, 1\), got 1.0",
    ),
    (BatchTopK, {"k": 30.5}, r"`k` must be in \[1, n_latents=30\], got k=30.5"),
    (BatchTopK, {"k": 0.0}, r"`k` must be in \[1, n_latents=30\], got k=0.0"),
    (BatchTopK, {"k": float("nan")}, "got k=nan"),
    (BatchTopK, {"k": 3, "threshold_rate": 0.0}, r"`threshold_rate` must be in \(0, 1\], got 0.0"),
    (MatryoshkaBatchTopK, {"k": 3, "widths": [10, 10]}, r"`widths` must increase .* got \[10, 10\]"),
    (MatryoshkaBatchTopK, {"k": 3, "widths": [20, 10]}, r"`widths` must increase .* got \[20, 10\]"),
    (MatryoshkaBatchTopK, {"k": 3, "widths": [10, 40]}, r"at most n_latents=30, .* got \[10, 40\]"),
    (MatryoshkaBatchTopK, {"k": 3, "widths": [0, 10]}, r"increase from at least 1 .* got \[0, 10\]"),
    *(
        (kind, arguments, match)
        for kind in (ReLU, Gated, JumpReLU)
        for arguments, match in [
            ({}, "one of `target_l0` and `sparsity_coefficient` must be given, got target_l0=None"),
            ({"target_l0": 3, "sparsity_coefficient": 0.1}, "must be given, got target_l0=3 and spars"),
            ({"target_l0": 0}, r"`target_l0` must be in \(0, n_latents=30\], got 0"),
            ({"target_l0": 30.5}, r"`target_l0` must be in \(0, n_latents=30\], got 30.5"),
            ({"target_l0": float("nan")}, "got nan"),
            (
                {"sparsity_coefficient": -0.1},
                "`sparsity_coefficient` must be at least 0 and finite, got -0.1",
            ),
            ({"sparsity_coefficient": float("inf")}, "at least 0 and finite, got inf"),
        ]
    ),
    (JumpReLU, {"sparsity_coefficient": 1.0, "penalty": "quadratic"}, "`target_l0` must be given with"),
    (JumpReLU, {"target_l0": 3, "bandwidth": 0.0}, "`bandwidth` must be positive and finite, got 0.0"),
]


@pytest.mark.parametrize(
    ("kind", "arguments", "match"), BAD, ids=lambda value: getattr(value, "__name__", None)
)
def test_arguments_out_of_range_are_errors(kind, arguments, match):
    with pytest.raises(InputError, match=match):
        kind(7, 30, **arguments)
