"""What every method's reconstruction costs the language model, measured once, after the final test."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import lightning
import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from sae.activations import ActivationDataModule
from sae.activations.contexts import held_out_cached, held_out_token_ids
from sae.activations.language_model import causal_head, language_model_of
from sae.activations.model_loss import ModelLoss, Replacement, model_losses
from sae.callbacks.baselines import BaselineCallback
from sae.dictionaries import Dictionary
from sae.errors import InputError
from sae.training import SparseAutoencoderModule

MOST_TOKENS = 131_072
"""Held-out tokens that cross entropy is measured on, at most."""


class SplicedLoss(lightning.Callback):
    """Cross entropy and KL on held-out documents with each reconstruction in place of the residual stream.

    The model as it is, the autoencoder, the mean of the training rows, and every baseline at the
    autoencoder's own L0. Positions that the cache has no rows of keep the residual stream in all of them.
    A cache may be trained on where its language model is not: then the figures stay null, and a line says
    why.
    """

    def __init__(self) -> None:
        self._clean: float | None = None
        self._losses: dict[str, ModelLoss] = {}

    def metrics(self) -> dict[str, Any]:
        """What goes into metrics.json."""
        if self._clean is None:
            return {}
        losses = dict(self._losses)
        ablated, spliced = losses.pop("mean_ablated"), losses.pop("sae")
        return {
            "ce_clean": self._clean,
            "ce_mean_ablated": ablated.ce,
            **_figures(spliced),
            "ce_tokens": self._tokens,
            "baselines": {name: _figures(loss) for name, loss in losses.items()},
        }

    @rank_zero_only
    def on_test_end(self, trainer: lightning.Trainer, pl_module: SparseAutoencoderModule) -> None:
        """Loads the model and measures."""
        data: ActivationDataModule = trainer.datamodule  # pyright: ignore
        if data.cache.manifest.get("model") is None:  # imported rows
            return
        try:
            model = language_model_of(data.cache.manifest, pl_module.device).model
        except InputError as error:
            print(f"Cross entropy was not measured: {error}", file=sys.stderr)
            return
        if causal_head(model) is None:
            return
        token_ids, cached = held_out_token_ids(data.cache), held_out_cached(data.cache)
        contexts = slice(max(1, MOST_TOKENS // token_ids.shape[1]))
        token_ids, cached = token_ids[contexts], None if cached is None else cached[contexts]
        mean = data.moments.mean.to(pl_module.device, torch.float32)
        replacements: dict[str, Replacement] = {
            "sae": _reconstruct(pl_module.dictionary),
            "mean_ablated": lambda x: mean.expand_as(x),
        }
        for callback in trainer.callbacks:  # pyright: ignore
            if isinstance(callback, BaselineCallback):
                replacements[callback.name] = callback.reconstruct
        try:
            self._clean, self._losses = model_losses(model, data.hookpoint, token_ids, replacements, cached)
        except (InputError, torch.OutOfMemoryError) as error:  # no reason to lose the scores of a training
            print(f"Cross entropy was not measured: {str(error).splitlines()[0]}", file=sys.stderr)
        self._tokens = token_ids.numel()


def _reconstruct(dictionary: Dictionary) -> Callable[[Tensor], Tensor]:
    return lambda x: dictionary(x.to(dictionary.directions.dtype)).x_hat


def _figures(loss: ModelLoss) -> dict[str, float | None]:
    return {
        "ce_spliced": loss.ce,
        "ce_increase": loss.ce_increase,
        "ce_increase_se": loss.ce_increase_se,
        "kl": loss.kl,
    }
