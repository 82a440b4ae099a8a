"""`resid.L`: the residual stream after L blocks, and a forward pass that stops once it has them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from sae.activations.language_model import find_blocks
from sae.errors import InputError


def hookpoint_names(model: PreTrainedModel) -> list[str]:
    """All hookpoints of a model: `resid.0` (after the embeddings) to `resid.<number of blocks>`."""
    return [f"resid.{depth}" for depth in range(len(find_blocks(model)[1]) + 1)]


def check_hookpoints(model: PreTrainedModel, hookpoints: list[str]) -> None:
    """Raises `InputError` unless the model has every hookpoint, once; lists those that it has."""
    available = hookpoint_names(model)
    unknown = [name for name in hookpoints if name not in available]
    if unknown:
        raise InputError(
            f"`hookpoints`: {type(model).__name__} has no {', '.join(unknown)}; it has"
            f" {', '.join(available)}."
        )
    if not hookpoints or len(set(hookpoints)) != len(hookpoints):
        raise InputError(f"`hookpoints` must name each hookpoint once and at least one, got {hookpoints}.")


@torch.inference_mode()
def residuals(
    model: PreTrainedModel, input_ids: Int[Tensor, "batch context"], hookpoints: list[str]
) -> dict[str, Float[Tensor, "batch context d_model"]]:
    """The residual stream at each hookpoint; blocks after the last one are not run.

    `resid.L` is transformers' `hidden_states[L]`, except that the last one is taken before the final
    norm. Values keep the model's dtype and device.

    Raises:
        InputError: if the model lacks a hookpoint.
    """
    check_hookpoints(model, hookpoints)
    found: dict[str, Tensor] = {}
    with _capturing(model, hookpoints, found), contextlib.suppress(_AllFound):
        model(input_ids=input_ids.to(model.device), **({"use_cache": False} if _caches(model) else {}))
    return {name: found[name] for name in hookpoints}


def _caches(model: PreTrainedModel) -> bool:
    """Whether a forward pass would build a key-value cache, which nobody reads here."""
    return bool(getattr(model.config.get_text_config(), "use_cache", False))


class _AllFound(Exception):
    """Leaves the forward pass after the last hookpoint."""


@contextlib.contextmanager
def _capturing(model: PreTrainedModel, hookpoints: list[str], found: dict[str, Tensor]) -> Iterator[None]:
    blocks = find_blocks(model)[1]

    def keep(name: str, value: Tensor) -> None:
        found[name] = value
        if len(found) == len(hookpoints):
            raise _AllFound

    def before_first(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep("resid.0", args[0] if args else kwargs["hidden_states"])

    def after(name: str, _block: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        keep(name, output[0] if isinstance(output, tuple) else output)

    handles = []
    try:
        for name in hookpoints:
            depth = int(name.removeprefix("resid."))
            if depth == 0:
                handles.append(blocks[0].register_forward_pre_hook(before_first, with_kwargs=True))
            else:
                handles.append(blocks[depth - 1].register_forward_hook(partial(after, name)))
        yield
    finally:
        for handle in handles:
            handle.remove()
