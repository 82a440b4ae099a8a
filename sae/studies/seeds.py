"""Dictionaries that differ in their seed alone, trained side by side: one batched product for all of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from sae.errors import InputError
from sae.ops.largest import largest
from sae.training.schedules import learning_rate_for, warmup_then_decay

HELD_OUT = 4096
"""Rows, the last ones, that latents are judged on and not trained on; a fifth of all, if that is less."""
SILENT = 20
"""Steps without firing after which a latent learns from what the others leave (AuxK)."""
AUXK = 1 / 32
_AT_ONCE = 1024
"""Held-out rows that are coded together."""


@dataclass(frozen=True)
class Seeds:
    """What the seeds have learned."""

    directions: Float[Tensor, "seeds n_latents d_model"]
    """Unit rows."""
    rate: Float[Tensor, "seeds n_latents"]
    """Share of the held-out rows on which a latent fires."""
    strength: Float[Tensor, "seeds n_latents"]
    """Mean of a latent where it fires, in units of the rows' root mean square coordinate; 0 where dead."""

    @property
    def alive(self) -> Bool[Tensor, "seeds n_latents"]:
        """Which latents fire at all."""
        return self.rate > 0


class _Stack:
    """TopK autoencoders of equal shape, their weights stacked: rows u (seeds, rows, d_model) of each."""

    def __init__(self, seeds: int, n_latents: int, d_model: int, k: int, draws: torch.Generator) -> None:
        self.k, self.n_latents = k, n_latents
        w_dec = F.normalize(torch.randn(seeds, n_latents, d_model, generator=draws), dim=2)
        self.w_enc, self.w_dec = w_dec.transpose(1, 2).contiguous(), w_dec
        self.b_enc, self.b_dec = torch.zeros(seeds, 1, n_latents), torch.zeros(seeds, 1, d_model)

    def to(self, device: torch.device) -> _Stack:
        """With gradients, on a device."""
        for name in ("w_enc", "w_dec", "b_enc", "b_dec"):
            setattr(self, name, getattr(self, name).to(device).requires_grad_())
        return self

    @property
    def parameters(self) -> list[Tensor]:
        return [self.w_enc, self.w_dec, self.b_enc, self.b_dec]

    def code(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Pre-activations, and the latents that fire, dense: there are few of them and many products."""
        pre_acts = torch.baddbmm(self.b_enc, u - self.b_dec, self.w_enc)
        return pre_acts, _keep(pre_acts, self.k)

    def loss(self, u: Tensor, steps_silent: Tensor) -> tuple[Tensor, Tensor]:
        """Sum over seeds of the mean squared error and of AuxK's share; and the firings of each latent.

        References:
            Scaling and evaluating sparse autoencoders, Gao et al. 2024, arXiv 2406.04093 (TopK, AuxK).
        """
        pre_acts, latents = self.code(u)
        residual = u - torch.baddbmm(self.b_dec, latents, self.w_dec)
        loss = residual.square().mean((1, 2)).sum()
        dead = steps_silent >= SILENT
        most = int(dead.sum(1).max())
        if most > 0:
            silent = pre_acts.masked_fill(~dead[:, None], -torch.inf)
            again = _keep(silent, min(max(1, u.shape[2] // 2), most)) @ self.w_dec
            left = residual.detach()
            error = (left - again).square().sum((1, 2)) / left.square().sum((1, 2)).clamp_min(1e-9)
            loss = loss + AUXK * error[dead.any(1)].sum()
        return loss, (latents.detach() > 0).sum(1)

    @torch.no_grad()
    def remove_parallel_gradient(self) -> None:
        """Takes from the gradient of each direction its part along it, which unit norm would undo."""
        assert self.w_dec.grad is not None
        along = torch.linalg.vecdot(self.w_dec.grad, self.w_dec)
        self.w_dec.grad.addcmul_(along[:, :, None], self.w_dec, value=-1)

    @torch.no_grad()
    def constrain(self) -> None:
        """Divides each direction by its norm."""
        self.w_dec.div_(self.w_dec.norm(dim=2, keepdim=True).clamp_min(1e-8))

    @torch.no_grad()
    def judge(self, u: Float[Tensor, "rows d_model"]) -> tuple[Tensor, Tensor]:
        """Rate and strength of every latent."""
        fired = u.new_zeros(len(self.w_dec), self.n_latents)
        total = fired.clone()
        for rows in u.split(_AT_ONCE):
            _, latents = self.code(rows.expand(len(self.w_dec), -1, -1))
            fired += (latents > 0).sum(1)
            total += latents.sum(1)
        return fired / len(u), total / fired.clamp_min(1)


def train_seeds(
    rows: Float[Tensor, "rows d_model"],
    n_latents: int,
    k: int,
    *,
    seeds: int = 5,
    steps: int = 400,
    batch_size: int = 256,
    seed: int = 0,
) -> Seeds:
    """Trains TopK dictionaries of one width on the same rows, each with its own start and order of rows.

    Args:
        rows: in raw units, well mixed; the last ones are held out.
        n_latents: width of each.
        k: latents a row.
        seeds: how many.
        steps: optimiser steps.
        batch_size: rows a step, for each.
        seed: of all that is drawn.

    Raises:
        InputError: for an argument out of range, or rows that are too few, not finite, or all the same.
    """
    _check(rows, n_latents, k, seeds, steps, batch_size)
    mean = rows.mean(0)
    variance = (rows - mean).square().mean()
    if not variance > 0:
        raise InputError("`rows` must differ, got rows that are all the same; check the hookpoint.")
    u = (rows - mean) / variance.sqrt()
    held_out = min(HELD_OUT, len(rows) // 5)
    train_u = u[:-held_out]
    draws = torch.Generator().manual_seed(seed)
    stack = _Stack(seeds, n_latents, rows.shape[1], k, draws).to(rows.device)
    lr = learning_rate_for(n_latents, steps)
    optimizer = torch.optim.Adam(stack.parameters, lr=lr, betas=(0.9, 0.98), fused=True)
    steps_silent = torch.zeros(seeds, n_latents, device=rows.device)
    for step in range(steps):
        factor = warmup_then_decay(step, warmup_steps=min(30, steps // 4), max_steps=steps, decay_share=0.3)
        optimizer.param_groups[0]["lr"] = lr * factor
        chosen = torch.randint(len(train_u), (seeds, batch_size), generator=draws).to(rows.device)
        loss, fired = stack.loss(train_u[chosen], steps_silent)
        steps_silent = torch.where(fired > 0, 0.0, steps_silent + 1)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        stack.remove_parallel_gradient()
        optimizer.step()
        stack.constrain()
    rate, strength = stack.judge(u[-held_out:])
    return Seeds(stack.w_dec.detach(), rate, strength)


def _keep(pre_acts: Tensor, k: int) -> Tensor:
    """The k largest of each row, rectified; all others zero."""
    columns: Int[Tensor, "rows k"] = largest(pre_acts.detach().flatten(0, 1), k).columns
    columns = columns.unflatten(0, pre_acts.shape[:2])
    return torch.zeros_like(pre_acts).scatter(2, columns, pre_acts.gather(2, columns).relu())


def _check(rows: Tensor, n_latents: int, k: int, seeds: int, steps: int, batch_size: int) -> None:
    for name, value, least in (("seeds", seeds, 2), ("steps", steps, 1), ("batch_size", batch_size, 1)):
        if value < least:
            raise InputError(f"`{name}` must be at least {least}, got {value}.")
    if not 1 <= k <= n_latents:
        raise InputError(f"`k` must be in [1, n_latents={n_latents}], got {k}; lower k or raise n_latents.")
    if len(rows) < 80 or not bool(rows.isfinite().all()):
        raise InputError(f"`rows` must be at least 80 and finite, got shape {tuple(rows.shape)}.")
