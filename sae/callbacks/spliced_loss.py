"""What every method's reconstruction costs the language model, measured once, after the final test."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import lightning
import torch
from torch import Tensor

from sae.activations import ActivationDataModule
from sae.activations.contexts import held_out_cached, held_out_token_ids
from sae.activations.language_model import causal_head, language_model_of
from sae.activations.model_loss import ContextLosses, ModelLoss, Replacement, context_losses
from sae.callbacks.baselines import BaselineCallback
from sae.dictionaries import Dictionary
from sae.errors import InputError
from sae.ops.group import ALONE, Group
from sae.training import SparseAutoencoderModule
from sae.training.names import SINGLE

MOST_TOKENS = 131_072
"""Held-out tokens that cross entropy is measured on, at most."""


class SplicedLoss(lightning.Callback):
    """Cross entropy and KL on held-out documents with each reconstruction in place of the residual stream.

    The model as it is, the autoencoder (each of them), the mean of the training rows, and every baseline at
    the autoencoder's own L0. Positions that the cache has no rows of keep the residual stream in all of them.
    A cache may be trained on where its language model is not: then the figures stay null, and a line says
    why.
    """

    def __init__(self) -> None:
        self._clean: float | None = None
        self._losses: dict[str, ModelLoss] = {}

        self._at: dict[str, dict[str, str]] = {}  # dictionary -> baseline -> its name among the losses

    def metrics(self, name: str = SINGLE) -> dict[str, Any]:
        """What goes into metrics.json, beside the scores of the dictionary of that name."""
        if self._clean is None:
            return {}
        return {
            "ce_clean": self._clean,
            "ce_mean_ablated": self._losses["mean_ablated"].ce,
            **_figures(self._losses[f"sae/{name}"]),
            "ce_tokens": self._tokens,
            "baselines": {baseline: _figures(self._losses[at]) for baseline, at in self._at[name].items()},
        }

    def on_test_end(self, trainer: lightning.Trainer, pl_module: SparseAutoencoderModule) -> None:
        """Loads the model and measures; ranks share the contexts."""
        data: ActivationDataModule = trainer.datamodule  # pyright: ignore
        if data.cache.manifest.get("model") is None:  # imported rows
            return
        token_ids, cached = held_out_token_ids(data.cache), held_out_cached(data.cache)
        contexts = slice(max(1, MOST_TOKENS // token_ids.shape[1]))
        token_ids, cached = token_ids[contexts], None if cached is None else cached[contexts]
        group = Group.of_training(pl_module.device)
        if len(token_ids) < group.world:  # too few to share: all measure all of them
            group = ALONE
        mine = group.share(token_ids), None if cached is None else group.share(cached)
        losses, failure = None, None
        try:
            losses = self._measure(trainer, pl_module, *mine)
        except (InputError, torch.OutOfMemoryError) as error:  # no reason to lose the scores of a training
            failure = str(error).splitlines()[0]
        failures = [why for why in group.objects(failure) if why]
        if failures and trainer.is_global_zero:
            print(f"Cross entropy was not measured: {failures[0]}", file=sys.stderr)
        if failures or losses is None:
            return
        self._clean, self._losses = losses.gathered(group).means()
        self._tokens = token_ids.numel()

    def _measure(
        self,
        trainer: lightning.Trainer,
        pl_module: SparseAutoencoderModule,
        token_ids: Tensor,
        cached: Tensor | None,
    ) -> ContextLosses | None:
        """The losses of some contexts; None where the model predicts no next token."""
        data: ActivationDataModule = trainer.datamodule  # pyright: ignore
        model = language_model_of(data.cache.manifest, pl_module.device).model
        if causal_head(model) is None:
            return None
        mean = data.moments.mean.to(pl_module.device, torch.float32)
        replacements: dict[str, Replacement] = {
            f"sae/{name}": _reconstruct(dictionary) for name, dictionary in pl_module.dictionaries.items()
        }
        replacements["mean_ablated"] = lambda x: mean.expand_as(x)
        baselines = [c for c in trainer.callbacks if isinstance(c, BaselineCallback)]  # pyright: ignore
        for name in pl_module.dictionaries:
            self._at[name] = {}
            for callback in baselines:  # dictionaries of the same L0 share what is measured
                k = callback.k_for(name)
                self._at[name][callback.name] = at = f"{callback.name}/{k}"
                replacements[at] = partial(callback.reconstruct, k=k)
        return context_losses(model, data.hookpoint, token_ids, replacements, cached)


def _reconstruct(dictionary: Dictionary) -> Callable[[Tensor], Tensor]:
    return lambda x: dictionary(x.to(dictionary.directions.dtype)).x_hat


def _figures(loss: ModelLoss) -> dict[str, float | None]:
    return {
        "ce_spliced": loss.ce,
        "ce_increase": loss.ce_increase,
        "ce_increase_se": loss.ce_increase_se,
        "kl": loss.kl,
    }
