"""What it costs a language model to have its residual stream replaced: cross entropy and KL, in nats."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedModel

from sae.activations.hookpoints import visiting, without_cache
from sae.activations.language_model import causal_head
from sae.errors import InputError
from sae.ops.group import Group

Replacement = Callable[[Float[Tensor, "rows d_model"]], Float[Tensor, "rows d_model"]]
"""What goes in place of rows of the residual stream; float32 in, any float dtype out."""

LOGITS_AT_ONCE = 2**24
"""Logits of one forward pass (64 MB as float32); sets how many contexts run together."""


class ModelLoss(NamedTuple):
    """Means over all next-token predictions."""

    ce: float
    """Cross entropy of the token that follows, nats."""
    ce_increase: float
    """`ce` less that of the model as it is, nats; 0 = the replacement costs nothing."""
    ce_increase_se: float | None
    """Standard error of `ce_increase`, from the spread between contexts, nats; None for one context."""
    kl: float
    """KL divergence from the clean to the changed next-token distribution, nats."""


class ContextLosses(NamedTuple):
    """What was measured on each context; float64, nats."""

    clean: Float64[Tensor, " contexts"]
    """Cross entropy of the model as it is."""
    changed: dict[str, Float64[Tensor, " contexts"]]
    """With each replacement."""
    divergence: dict[str, Float64[Tensor, " contexts"]]
    """KL from the clean to the changed predictions."""

    def gathered(self, group: Group) -> ContextLosses:
        """With the contexts of all ranks."""
        return ContextLosses(
            group.gather(self.clean),
            {name: group.gather(each) for name, each in self.changed.items()},
            {name: group.gather(each) for name, each in self.divergence.items()},
        )

    def means(self) -> tuple[float, dict[str, ModelLoss]]:
        """Cross entropy of the model as it is, and what each replacement does."""
        return float(self.clean.mean()), {
            name: _loss(self.clean, self.changed[name], self.divergence[name]) for name in self.changed
        }


def model_losses(
    model: PreTrainedModel,
    hookpoint: str,
    token_ids: Int[Tensor, "sequences context"],
    replacements: Mapping[str, Replacement],
    cached: Bool[Tensor, "sequences context"] | None = None,
) -> tuple[float, dict[str, ModelLoss]]:
    """Cross entropy (nats) of the model as it is, and with each replacement: `context_losses`, averaged."""
    return context_losses(model, hookpoint, token_ids, replacements, cached).means()


@torch.inference_mode()
def context_losses(
    model: PreTrainedModel,
    hookpoint: str,
    token_ids: Int[Tensor, "sequences context"],
    replacements: Mapping[str, Replacement],
    cached: Bool[Tensor, "sequences context"] | None = None,
) -> ContextLosses:
    """Cross entropy (nats) of the model as it is, and with each replacement at the hookpoint.

    Every token of every context is predicted from those before it in the context, the first excepted;
    the replacement acts on all positions, or on those that `cached` names. Differences are taken per
    context, so what the contexts share does not blur them.

    Args:
        model: with a causal head.
        hookpoint: where the replacements act.
        token_ids: contexts without padding, at least one, of at least two tokens.
        replacements: name -> what to put in place of x.
        cached: positions that the replacements act on; the others keep their x, and predictions at them
            count all the same. For a dictionary that was trained without some positions: nothing is known
            of its reconstruction there, and at position 0, where many models have a vector of enormous
            norm that later tokens attend to, a wrong one ruins the whole context. None = all.

    Raises:
        InputError: if the model has no causal head or there is nothing to predict.
    """
    head = causal_head(model)
    if head is None:
        raise InputError(f"{type(model).__name__} has no causal head; cross entropy has no meaning for it.")
    if len(token_ids) == 0 or token_ids.shape[1] < 2:
        raise InputError(f"there is nothing to predict in contexts of shape {tuple(token_ids.shape)}.")
    clean: list[Tensor] = []
    changed: dict[str, list[Tensor]] = {name: [] for name in replacements}
    divergence: dict[str, list[Tensor]] = {name: [] for name in replacements}
    vocabulary = len(next(head.parameters()))
    at_once = max(1, LOGITS_AT_ONCE // (vocabulary * token_ids.shape[1]))
    batches = range(0, len(token_ids), at_once)
    for begin in tqdm(batches, desc="cross entropy", unit=" batches", leave=False):
        some = slice(begin, begin + at_once)
        ids = token_ids[some].long().to(model.device)
        acting = None if cached is None else cached[some]
        of_clean = _log_probs(model, ids)
        clean.append(_cross_entropy(of_clean, ids))
        for name, replacement in replacements.items():
            with visiting(model, hookpoint, _on_rows(replacement, acting)):
                of_changed = _log_probs(model, ids)
            changed[name].append(_cross_entropy(of_changed, ids))
            kl = (of_clean.exp() * (of_clean - of_changed)).sum(-1)
            divergence[name].append(kl.double().mean(-1))
    return ContextLosses(
        torch.cat(clean),
        {name: torch.cat(each) for name, each in changed.items()},
        {name: torch.cat(each) for name, each in divergence.items()},
    )


def _log_probs(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Log-probabilities of each next token, at all positions but the last, float32."""
    logits = model(input_ids=ids, **without_cache(model)).logits
    return F.log_softmax(logits[:, :-1].float(), dim=-1)


def _cross_entropy(log_probs: Tensor, ids: Tensor) -> Tensor:
    """Per context, in float64."""
    return -log_probs.gather(-1, ids[:, 1:, None]).squeeze(-1).double().mean(-1)


def _on_rows(replacement: Replacement, acting: Tensor | None) -> Callable[[Tensor], Tensor | None]:
    def visit(x: Tensor) -> Tensor | None:
        if acting is None:
            rows = replacement(x.reshape(-1, x.shape[-1]).float())
            return rows.to(x.device, x.dtype).reshape(x.shape)
        here = acting.to(x.device)
        if not here.any():
            return None
        changed = x.clone()
        # Only these rows are handed over: the others may be infinite, and no method was fitted to them.
        changed[here] = replacement(x[here].float()).to(x.device, x.dtype)
        return changed

    return visit


def _loss(clean: Tensor, changed: Tensor, divergence: Tensor) -> ModelLoss:
    increase = changed - clean
    spread = float(increase.std()) / math.sqrt(len(increase)) if len(increase) > 1 else None
    return ModelLoss(float(changed.mean()), float(increase.mean()), spread, float(divergence.mean()))
