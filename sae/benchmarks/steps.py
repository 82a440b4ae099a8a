"""Training steps to be timed: ours, a dense one, and the encoder's product alone."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sae.benchmarks.cases import Case
from sae.dictionaries import SparseAutoencoder, TopK
from sae.ops.encoder import PreActs
from sae.training.divergence import clip_gradients
from sae.training.learner import Learner
from sae.training.pace import Pace
from sae.training.recipe import Recipe

LR = 3e-4
Step = Callable[[], object]


class Ours:
    """The product's own step but for Lightning: loss, backward, clipping, fused Adam, unit norm, counters."""

    def __init__(
        self, case: Case, dictionary: SparseAutoencoder | None = None, recipe: Recipe | None = None
    ) -> None:
        torch.manual_seed(0)
        self.case = case
        if dictionary is None:
            dictionary = TopK(case.d_model, case.n_latents, case.k)
        self.learner = Learner(dictionary, recipe or Recipe(())).to(case.device)
        self.learner.plan(10**6, case.rows)
        self.optimizer = Pace(LR).adam([dictionary], 10**6)
        self.steps = 0

    def __call__(self, x: Tensor) -> Tensor:
        """One step; the loss."""
        learner, case = self.learner, self.case
        with torch.autocast(x.device.type, case.torch_dtype, enabled=case.dtype != "float32"):
            losses = learner.loss(learner.dictionary.normalise(x), self.steps)
        losses.total.backward()
        learner.arrive(self.steps)
        clip_gradients(list(learner.dictionary.parameters()), 1.0, None)
        self.optimizer.step()
        learner.settle(self.steps, self.optimizer)
        self.optimizer.zero_grad()
        self.steps += 1
        return losses.total.detach()


class WithoutKernels(Ours):
    """The same by torch's operations alone, as where there is neither compiler nor Triton."""

    def __call__(self, x: Tensor) -> Tensor:
        """One step; the loss."""
        before = os.environ.get("SAE_KERNELS")
        os.environ["SAE_KERNELS"] = "off"
        try:
            return super().__call__(x)
        finally:
            os.environ.pop("SAE_KERNELS")
            if before is not None:
                os.environ["SAE_KERNELS"] = before


class Dense:
    """The same step as it is written first: a matrix of all latents, decoded by a product, by autograd.

    It begins at the same weights and takes the same steps as `Ours`, up to rounding.
    """

    def __init__(self, case: Case, compiled: bool = False) -> None:
        torch.manual_seed(0)
        self.case = case
        like = TopK(case.d_model, case.n_latents, case.k).to(case.device)
        self.W_dec, self.W_enc = (nn.Parameter(w.detach().clone()) for w in (like.W_dec, like.W_enc_rows))
        self.b_dec, self.b_enc = (nn.Parameter(b.detach().clone()) for b in (like.b_dec, like.b_enc))
        self.parameters = [self.W_dec, self.W_enc, self.b_dec, self.b_enc]
        self.optimizer = torch.optim.Adam(self.parameters, lr=LR, fused=True)
        self.loss = torch.compile(self._loss) if compiled else self._loss

    def _loss(self, x: Tensor) -> Tensor:
        pre_acts = F.linear(x, self.W_enc, self.b_enc)
        strongest = pre_acts.topk(self.case.k, dim=-1, sorted=False)
        latents = torch.zeros_like(pre_acts).scatter(-1, strongest.indices, strongest.values.relu())
        return (x - (latents @ self.W_dec + self.b_dec)).square().mean()

    def __call__(self, x: Tensor) -> Tensor:
        """One step; the loss."""
        with torch.autocast(x.device.type, self.case.torch_dtype, enabled=self.case.dtype != "float32"):
            loss = self.loss(x)
        loss.backward()
        with torch.no_grad():
            W, gradient = self.W_dec, self.W_dec.grad
            assert gradient is not None
            gradient -= (gradient * W).sum(1, keepdim=True) * W
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            W /= W.norm(dim=1, keepdim=True)
        self.optimizer.zero_grad()
        return loss.detach()


def missing_compiler() -> str | None:
    """What torch.compile would look for and not find."""
    asked = os.environ.get("CXX")
    if any(map(shutil.which, [asked] if asked else ["g++", "clang++"])):
        return None
    return f"the compiler that CXX names, {asked}" if asked else "a C++ compiler such as g++"


class Floor:
    """The encoder's product alone, into memory that is there, in the dtype of the case."""

    def __init__(self, case: Case) -> None:
        self.dtype = case.torch_dtype
        self.W = torch.randn(case.n_latents, case.d_model, device=case.device).to(self.dtype)
        self.out = torch.empty(case.rows, case.n_latents, dtype=self.dtype, device=case.device)

    def __call__(self, x: Tensor) -> Tensor:
        """One product."""
        return torch.mm(x.to(self.dtype), self.W.T, out=self.out)


class Encoder:
    """The encoder's product as ours makes it: in blocks, on a CPU by oneDNN, faster than `torch.mm`."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.W, self.b = (
            Floor(case).W,
            torch.zeros(case.n_latents, device=case.device, dtype=case.torch_dtype),
        )

    def __call__(self, x: Tensor) -> None:
        """One product."""
        for block in PreActs(x.to(self.case.torch_dtype), self.W, self.b):
            del block  # before the next one is made


def on_batches(step: Callable[[Tensor], object], case: Case) -> Step:
    """The step on one batch in memory after the other."""
    batches = itertools.cycle(case.batches())

    return lambda: step(next(batches))
