"""The mean of squares and its gradient."""

import torch

from sae.ops.mean_square import mean_square


def test_value_and_gradient_are_torchs():
    x = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(mean_square, x)
    (expected,) = torch.autograd.grad(3 * x.square().mean(), x)
    found = mean_square(x)
    assert torch.equal(found, x.square().mean())
    torch.testing.assert_close(torch.autograd.grad(3 * found, x)[0], expected, rtol=1e-14, atol=0)
