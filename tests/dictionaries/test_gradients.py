"""The training loss of every kind and all its gradients, against the formulas written densely."""

import pytest
import torch
from support.kinds import D, K, N, make, rows

from sae.training.learner import Learner
from sae.training.recipe import Recipe

ROWS = 40
DEAD = [2, 5, 11, 17, 23]
WAYS = [(), ("auxk",), ("pre_act",), ("auxk", "pre_act")]
CASES = [
    ("TopK", {"k": K}),
    ("BatchTopK", {"k": K}),
    ("BatchTopK", {"k": 2.7}),
    ("MatryoshkaBatchTopK", {"k": K, "widths": [4, 9]}),
    ("ReLU", {"sparsity_coefficient": 0.3}),
    ("Gated", {"sparsity_coefficient": 0.3}),
    ("JumpReLU", {"sparsity_coefficient": 0.3}),
    ("JumpReLU", {"sparsity_coefficient": 0.3, "penalty": "tanh"}),
    ("JumpReLU", {"target_l0": 4.0, "sparsity_coefficient": 0.3, "penalty": "quadratic"}),
]


class _Jump(torch.autograd.Function):
    """z where z > threshold; the derivatives of the paper, a box of the bandwidth for Dirac's delta."""

    @staticmethod
    def forward(ctx, z, threshold, bandwidth):
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return z * (z > threshold)

    @staticmethod
    def backward(ctx, grad):
        z, threshold = ctx.saved_tensors
        delta = ((z - threshold).abs() < ctx.bandwidth / 2) / ctx.bandwidth
        return grad * ((z > threshold) + threshold * delta), -(grad * threshold * delta).sum(0), None


class _Step(torch.autograd.Function):
    """1 where z > threshold."""

    @staticmethod
    def forward(ctx, z, threshold, bandwidth):
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return (z > threshold).to(z)

    @staticmethod
    def backward(ctx, grad):
        z, threshold = ctx.saved_tensors
        delta = ((z - threshold).abs() < ctx.bandwidth / 2) / ctx.bandwidth
        return grad * delta, -(grad * delta).sum(0), None


class _TanhStep(torch.autograd.Function):
    """tanh(4 z) where z > threshold."""

    @staticmethod
    def forward(ctx, z, threshold, bandwidth):
        ctx.save_for_backward(z, threshold)
        ctx.bandwidth = bandwidth
        return (4 * z).tanh() * (z > threshold)

    @staticmethod
    def backward(ctx, grad):
        z, threshold = ctx.saved_tensors
        delta = ((z - threshold).abs() < ctx.bandwidth / 2) / ctx.bandwidth
        of_step = (4 * threshold).tanh() * delta
        return grad * (4 / (4 * z).cosh() ** 2 * (z > threshold) + of_step), -(grad * of_step).sum(0), None


def _dense_loss(d, u, dead, ways, energy):
    """loss, from the docstrings, with dense matrices."""
    kind = type(d).__name__
    C = torch.eye(D).double() if d.whitening is None else d.whitening
    v = u @ C
    z = v @ d.W_enc + d.b_enc
    mean_square = lambda residual: (residual @ C).square().mean()  # noqa: E731
    extra, widths = 0.0, [N]
    if kind == "TopK":
        latents = z.relu() * torch.zeros_like(z).scatter(1, z.topk(d.k, 1).indices, 1.0)
    elif "BatchTopK" in kind:
        places = z.flatten().topk(int(d.k * len(u))).indices
        latents = z.relu() * torch.zeros(z.numel()).double().scatter(0, places, 1.0).view_as(z)
        widths = getattr(d, "widths", widths)
    elif kind == "ReLU":
        latents = z.relu()
        extra = 0.3 * latents.sum() / len(u)
    elif kind == "Gated":
        latents = (d.r_mag.exp() * (v @ d.W_enc) + d.b_mag).relu() * (z > 0)
        extra = mean_square(u - z.relu() @ d.W_dec.detach() - d.b_dec.detach())
        extra = extra + 0.3 * z.relu().sum() / len(u)
    else:
        latents = _Jump.apply(z, d.threshold, d.bandwidth)
        step = (_TanhStep if d.penalises == "tanh" else _Step).apply(z, d.threshold, d.bandwidth)
        l0 = step.sum() / len(u)
        if d.penalises == "quadratic":  # of value (recent / target - 1)^2, the derivative taken there too
            off = d.recent_l0 / 4.0 - 1
            extra = 0.3 * (off**2 + 2 * off / 4.0 * (l0 - l0.detach()))
        else:
            extra = 0.3 * l0
    u_hats = [latents[:, :m] @ d.W_dec[:m] + d.b_dec for m in widths]
    loss = sum(mean_square(u - u_hat) for u_hat in u_hats) / len(widths) + extra
    of_dead = z[:, dead]
    if "auxk" in ways:
        k = min(len(dead), D // 2)
        code = of_dead.relu() * torch.zeros_like(of_dead).scatter(1, of_dead.topk(k, 1).indices, 1.0)
        missed = (u - u_hats[-1]).detach() - code @ d.W_dec[dead]
        loss = loss + mean_square(missed) / energy / 32
    if "pre_act" in ways:
        needed = torch.zeros(()).double()
        if kind == "JumpReLU":
            needed = d.threshold[dead]
        elif kind == "TopK":
            needed = 0.999 * z.topk(d.k, 1).values.relu().amin(1, keepdim=True).detach()
        elif "BatchTopK" in kind:
            needed = d.fires_above
        lack = needed - of_dead
        loss = loss + 0.5 * lack.relu().sum() / len(u)
    return loss


def _learner(dictionary, ways):
    learner = Learner(dictionary, Recipe(revival=ways, pre_act_coefficient=0.5)).double()
    learner.plan(10, ROWS)
    learner.dead_latents.dead[DEAD] = True
    learner.energy.fill_(0.4)
    return learner


@pytest.mark.parametrize("whiten", [False, True])
@pytest.mark.parametrize("ways", WAYS)
@pytest.mark.parametrize(("kind", "arguments"), CASES)
def test_loss_and_every_gradient_equal_the_dense_formula(kind, arguments, ways, whiten):
    dictionary = make(kind, whiten=whiten, **arguments)
    if kind == "JumpReLU":
        dictionary.recent_l0.fill_(6.0)
    u = dictionary.normalise(rows(ROWS, seed=9))
    ours = _learner(dictionary, ways).loss(u, step=10).total
    reference = _dense_loss(dictionary, u, torch.tensor(DEAD), ways, 0.4)
    torch.testing.assert_close(ours, reference)
    names, parameters = zip(*dictionary.named_parameters(), strict=True)
    found, expected = (torch.autograd.grad(loss, parameters) for loss in (ours, reference))
    for name, a, b in zip(names, found, expected, strict=True):
        assert b.abs().max() > 0, name
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12, msg=lambda told, name=name: f"{name}: {told}")


@pytest.mark.parametrize(("kind", "arguments"), CASES[:5])
def test_gradients_are_the_slope_of_the_loss(kind, arguments):
    dictionary = make(kind, **arguments)
    u = dictionary.normalise(rows(ROWS, seed=9))
    learner = _learner(dictionary, ())
    for parameter in dictionary.parameters():
        towards = torch.randn_like(parameter)
        (grad,) = torch.autograd.grad(learner.loss(u, step=10).total, parameter)
        losses = []
        for way in (1e-7, -2e-7):
            with torch.no_grad():
                parameter += way * towards
                losses.append(learner.loss(u, step=10).total)
        with torch.no_grad():
            parameter += 1e-7 * towards
        slope = (losses[0] - losses[1]) / 2e-7
        torch.testing.assert_close((grad * towards).sum(), slope, rtol=1e-5, atol=1e-6)


def test_jumprelu_threshold_has_no_gradient_outside_the_bandwidth():
    dictionary = make("JumpReLU", sparsity_coefficient=0.3, bandwidth=0.2)
    u = dictionary.normalise(rows(ROWS, seed=9))
    _learner(dictionary, ()).loss(u, step=10).total.backward()
    gap = u @ dictionary.W_enc + dictionary.b_enc - dictionary.threshold
    near = (gap.abs() < 0.1).any(0)
    assert near.any() and not near.all()
    assert torch.equal(dictionary.threshold.grad != 0, near)


@pytest.mark.parametrize(("kind", "arguments"), CASES)
@pytest.mark.parametrize("way", ["auxk", "pre_act"])
def test_revival_moves_only_the_dead(kind, arguments, way):
    """The difference that a way of revival makes to the gradients."""
    dictionary = make(kind, **arguments)
    u = dictionary.normalise(rows(ROWS, seed=9))
    with_it, without = (_learner(dictionary, ways).loss(u, step=10).total for ways in ((way,), ()))
    parameters = list(dictionary.parameters())
    pairs = zip(*(torch.autograd.grad(loss, parameters) for loss in (with_it, without)), strict=True)
    for (name, parameter), (a, b) in zip(dictionary.named_parameters(), pairs, strict=True):
        difference = (a - b).abs()
        if name == "b_dec":
            assert difference.max() < 1e-12
        else:
            of_latent = difference.reshape(N, -1).sum(1) > 1e-12
            assert set(of_latent.nonzero().flatten().tolist()) <= set(DEAD), (name, parameter.shape)


@pytest.mark.parametrize(("kind", "arguments"), CASES)
def test_repeated_steps_on_one_batch_lower_the_loss_and_count_what_fired(kind, arguments):
    dictionary = make(kind, **arguments)
    learner = Learner(dictionary, Recipe(revival=(), l0_start=1.0))
    learner.plan(1, ROWS)
    u = dictionary.normalise(rows(ROWS, seed=9))
    optimizer = torch.optim.Adam(dictionary.parameters(), lr=3e-3)
    losses, since = [], torch.zeros(N, dtype=torch.int64)
    for step in range(30):
        fired = (dictionary.training_code(u).latents.to_dense(N) > 0).any(0)
        since = (since + ROWS).masked_fill(fired, 0)
        optimizer.zero_grad()
        loss = learner.loss(u, step)
        loss.total.backward()
        learner.arrive(step)
        optimizer.step()
        learner.settle(step, optimizer)
        losses.append(float(sum(loss.parts[name] for name in ("reconstruction",))))
        assert torch.equal(learner.dead_latents.tokens_since_fired, since)
    assert losses[-1] < 0.8 * losses[0]
