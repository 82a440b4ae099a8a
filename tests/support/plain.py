"""Kinds as the leading public trainer has them by default: what our recipes are measured against.

Decoder rows of norm 0.1, the encoder their transpose, zero biases, Adam at 3e-4, constant, clipping at 1,
inputs as they are (research/saelens.md §1.1 and §1.2).
"""

import torch
from torch import nn

from sae.dictionaries import Dictionary, JumpReLU, TopK
from sae.training.sparsity import SparsityControl


class _Plain:
    """Weights and optimiser."""

    def __init__(self, d_model: int, n_latents: int, *more: nn.Parameter):
        W_dec = nn.init.kaiming_uniform_(torch.empty(n_latents, d_model))
        self.W_dec = nn.Parameter(0.1 * W_dec / W_dec.norm(dim=1, keepdim=True))
        self.W_enc = nn.Parameter(self.W_dec.detach().T.clone())
        self.b_enc, self.b_dec = nn.Parameter(torch.zeros(n_latents)), nn.Parameter(torch.zeros(d_model))
        self.parameters = [self.W_dec, self.W_enc, self.b_enc, self.b_dec, *more]
        self.optimizer = torch.optim.Adam(self.parameters, lr=3e-4)

    def pre_acts(self, x):
        return (x - self.b_dec) @ self.W_enc + self.b_enc

    def step(self, loss):
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()

    @torch.no_grad()
    def given_to(self, learned: Dictionary, **more) -> Dictionary:
        """The dictionary with these weights, latents in units of directions of norm one."""
        norms = self.W_dec.norm(dim=1)
        folded = {
            "W_enc": self.W_enc * norms, "b_enc": (self.b_enc - self.b_dec @ self.W_enc) * norms,
            "W_dec": self.W_dec / norms[:, None], "b_dec": self.b_dec,
        }  # fmt: skip
        learned.load_saved_tensors(folded | {name: value * norms for name, value in more.items()})
        return learned.requires_grad_(False)


class _Ramp(torch.autograd.Function):
    """pre * (pre > threshold), or the step alone; the threshold's gradient is a rectangle's."""

    @staticmethod
    def forward(ctx, pre, threshold, bandwidth, is_step):
        ctx.save_for_backward(pre, threshold)
        ctx.bandwidth, ctx.is_step = bandwidth, is_step
        fires = (pre > threshold).to(pre.dtype)
        return fires if is_step else pre * fires

    @staticmethod
    def backward(ctx, grad):
        pre, threshold = ctx.saved_tensors
        near = ((pre - threshold).abs() < ctx.bandwidth / 2).to(pre.dtype) / ctx.bandwidth
        height = 1.0 if ctx.is_step else threshold
        to_pre = None if ctx.is_step else grad * (pre > threshold)
        return to_pre, -(height * near * grad).sum(0), None, None


def plain_jumprelu(sample, d_model: int, n_latents: int, target_l0: float, steps: int) -> Dictionary:
    """Thresholds 0.01, bandwidth 0.05, step penalty without gradient to the inputs, no revival.

    Its penalty has no target, so the coefficient is moved towards the L0 of the others; as 2,000 such steps
    do not get there, thresholds below a common one are raised to it in the end, until L0 is the same. Both
    are favours.
    """
    threshold = nn.Parameter(torch.full((n_latents,), 0.01))
    plain = _Plain(d_model, n_latents, threshold)
    control = SparsityControl(target_l0=target_l0, start=0.1)
    for step in range(steps):
        x = sample(step)
        pre = plain.pre_acts(x)
        latents = _Ramp.apply(pre.relu(), threshold, 0.05, False)
        l0 = _Ramp.apply(pre, threshold, 0.05, True).sum(1).mean()
        error = (latents @ plain.W_dec + plain.b_dec - x).square().sum(1).mean()
        plain.step(error + control.coefficient(0.0) * l0)
        control.update(l0.detach())
    with torch.no_grad():
        pre = plain.pre_acts(sample(steps))
        active = pre[pre > threshold]
        firing = min(len(active), round(target_l0 * len(pre)))
        threshold.clamp_min_(active.kthvalue(max(1, len(active) - firing)).values)
    return plain.given_to(JumpReLU(d_model, n_latents, target_l0=target_l0), threshold=threshold.detach())


def plain_topk(sample, d_model: int, n_latents: int, k: int, steps: int) -> Dictionary:
    """Compares latents times their norms; AuxK with coefficient 1, dead after a thousand steps."""
    plain, silent = _Plain(d_model, n_latents), torch.zeros(n_latents)
    for step in range(steps):
        x = sample(step)
        norms = plain.W_dec.norm(dim=1)
        pre = plain.pre_acts(x) * norms
        latents = _largest(pre, k)
        x_hat = (latents / norms) @ plain.W_dec + plain.b_dec
        loss = (x_hat - x).square().sum(1).mean()
        silent = torch.where((latents > 0).any(0), 0, silent + 1)
        if n_dead := int((silent > 1000).sum()):
            revived = _largest(pre.masked_fill(silent <= 1000, -torch.inf), min(d_model // 2, n_dead))
            missed = (revived / norms) @ plain.W_dec - (x - x_hat).detach()
            loss = loss + min(1.0, n_dead / (d_model // 2)) * missed.square().sum(1).mean()
        plain.step(loss)
    return plain.given_to(TopK(d_model, n_latents, k))


def _largest(pre, k):
    values, indices = pre.topk(k, dim=1)
    return torch.zeros_like(pre).scatter(1, indices, values.relu())
