"""Adam on the rows that have a gradient, against torch's on the same rows and a loop over the formula."""

import sys

import pytest
import torch

from sae.training.row_sparse_adam import RowSparseAdam

DTYPE = torch.float64
ROWS, WIDTH, LR, BETAS, EPS = 6, 4, 0.01, (0.9, 0.999), 1e-8


@pytest.fixture(autouse=True, params=[torch.float64, torch.float32])
def precision(request, monkeypatch):
    """In float32 it is the compiled kernel, where that can be had."""
    monkeypatch.setattr(sys.modules[__name__], "DTYPE", request.param)


def _close(found, wanted):
    rtol, atol = {torch.float64: (1e-10, 1e-14), torch.float32: (1e-6, 1e-6)}[DTYPE]
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=atol)


def _parameters(seed=0):
    torch.manual_seed(seed)
    made = [torch.randn(ROWS, WIDTH), torch.randn(ROWS)]
    return [torch.nn.Parameter(tensor.to(DTYPE)) for tensor in made]


def _gradients(seed, taking_part):
    generator = torch.Generator().manual_seed(seed)
    found = []
    for shape in ((ROWS, WIDTH), (ROWS,)):
        gradient = torch.zeros(shape, dtype=DTYPE)
        for row in taking_part:
            gradient[row] = torch.randn(shape[1:], generator=generator, dtype=DTYPE)
        found.append(gradient)
    return found


def _step(optimizer, parameters, gradients):
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    optimizer.step()


def test_where_every_row_has_a_gradient_it_is_adam():
    mine, torchs = _parameters(), _parameters()
    sparse = RowSparseAdam(mine, lr=LR, fused=True)
    dense = torch.optim.Adam(torchs, lr=LR, fused=True)
    for step in range(5):
        for optimizer, parameters in ((sparse, mine), (dense, torchs)):
            _step(optimizer, parameters, _gradients(step, range(ROWS)))
    for a, b in zip(mine, torchs, strict=True):
        _close(a.detach(), b.detach())


def test_rows_follow_the_formula_and_stay_where_they_have_no_part():
    parameters = _parameters()
    optimizer = RowSparseAdam(parameters, lr=LR, fused=True)
    weights = [p.detach().clone() for p in parameters]
    moments = [(torch.zeros_like(w), torch.zeros_like(w)) for w in weights]
    for step, taking_part in enumerate([[0, 1, 2, 3, 4, 5], [1, 4], [], [4], [0, 4, 5]], start=1):
        gradients = _gradients(step, taking_part)
        before = [p.detach().clone() for p in parameters]
        _step(optimizer, parameters, gradients)
        for w, (m, v), g in zip(weights, moments, gradients, strict=True):
            for row in taking_part:
                m[row] = BETAS[0] * m[row] + (1 - BETAS[0]) * g[row]
                v[row] = BETAS[1] * v[row] + (1 - BETAS[1]) * g[row] ** 2
                bias = [1 - beta**step for beta in BETAS]
                w[row] -= LR * (m[row] / bias[0]) / ((v[row] / bias[1]).sqrt() + EPS)
        silent = [row for row in range(ROWS) if row not in taking_part]
        for parameter, old, wanted in zip(parameters, before, weights, strict=True):
            _close(parameter.detach(), wanted)
            assert torch.equal(parameter.detach()[silent], old[silent])
    for parameter, (m, v) in zip(parameters, moments, strict=True):
        _close(optimizer.state[parameter]["exp_avg"], m)
        _close(optimizer.state[parameter]["exp_avg_sq"], v)


@pytest.mark.parametrize("taking_part", [[2], range(ROWS)])
def test_a_step_that_is_not_finite_changes_nothing(taking_part):
    parameters = _parameters()
    optimizer = RowSparseAdam(parameters, lr=LR, fused=True)
    _step(optimizer, parameters, _gradients(0, [1, 2]))
    before = [p.detach().clone() for p in parameters]
    moments = [optimizer.state[p]["exp_avg"].clone() for p in parameters]
    gradients = _gradients(1, taking_part)
    gradients[0][2] = torch.nan
    optimizer.found_inf = torch.ones(())
    _step(optimizer, parameters, gradients)
    assert all(torch.equal(p.detach(), old) for p, old in zip(parameters, before, strict=True))
    assert all(
        torch.equal(optimizer.state[p]["exp_avg"], m) for p, m in zip(parameters, moments, strict=True)
    )


def test_saved_in_between_it_goes_on_the_same():
    unbroken, cut = _parameters(), _parameters()
    first, second = RowSparseAdam(unbroken, lr=LR, fused=True), RowSparseAdam(cut, lr=LR, fused=True)
    for step in range(6):
        if step == 3:
            state = second.state_dict()
            second = RowSparseAdam(cut, lr=LR, fused=True)
            second.load_state_dict(state)
        for optimizer, parameters in ((first, unbroken), (second, cut)):
            _step(optimizer, parameters, _gradients(step, [step % ROWS, 3]))
    assert all(torch.equal(a, b) for a, b in zip(unbroken, cut, strict=True))
