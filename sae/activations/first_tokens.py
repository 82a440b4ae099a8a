"""Which tokens of a forward pass are the first of their sequences, with key-value caches and padding."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from sae.errors import InputError

FirstTokens = Callable[[Float[Tensor, "batch context d_model"]], Bool[Tensor, "batch context"]]
"""Given the residual stream inside a pass, True at the first token of each sequence that begins in it."""

KEY_VALUES = ("cache", "past_key_values")
"""What the key-value cache is called in a model's arguments: by late versions of transformers, and others."""


class _Pass(NamedTuple):
    """What a pass was called with."""

    past: int
    """Tokens that its key-value cache held when it began."""
    mask: Tensor | None


@contextlib.contextmanager
def watching_first_tokens(model: PreTrainedModel) -> Iterator[FirstTokens]:
    """Gives a function that says, inside a forward pass of the model, where sequences begin.

    A residual stream does not show that: the passes of `generate` after the first one have tokens further
    on. So the arguments of each pass are read: what its key-value cache holds came before, and what its
    attention mask hides on the left is padding. Each row of a batch is taken as one sequence.

    Yields:
        The function. It raises `InputError` outside a pass of this very model (a pass of a part of it
        shows no arguments), and if the attention mask does not have the shape (batch, context).
    """
    under_way: list[_Pass] = []
    parameters = list(inspect.signature(model.forward).parameters)

    def begin(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        named = {**dict(zip(parameters, args, strict=False)), **kwargs}
        past = next((named[name] for name in KEY_VALUES if named.get(name) is not None), None)
        under_way.append(_Pass(_length(past), named.get("attention_mask")))

    def end(*_: Any) -> None:
        under_way.clear()

    def first_tokens(x: Tensor) -> Tensor:
        if not under_way:
            raise InputError(
                "`skip_first_position` must know how the model was called; run the"
                f" {type(model).__name__} that was spliced, not a part of it."
            )
        past, mask = under_way[-1]
        first = torch.full((len(x), 1), -past, device=x.device)
        if mask is not None:
            if not isinstance(mask, Tensor) or mask.ndim != 2:
                found = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
                raise InputError(
                    "`skip_first_position` takes an `attention_mask` of shape (batch, context), got"
                    f" {found}; a generation needs a dynamic key-value cache for that."
                )
            first = first + (mask != 0).int().argmax(1, keepdim=True).to(x.device)
        return torch.arange(x.shape[1], device=x.device) == first

    handles = [
        model.register_forward_pre_hook(begin, with_kwargs=True),
        model.register_forward_hook(end, always_call=True),
    ]
    try:
        yield first_tokens
    finally:
        for handle in handles:
            handle.remove()


def _length(past: Any) -> int:
    """Tokens that a key-value cache holds."""
    if past is None:
        return 0
    if not hasattr(past, "get_seq_length"):
        raise InputError(
            f"`past_key_values` must be a transformers Cache, got {type(past).__name__}; DynamicCache is one."
        )
    return int(past.get_seq_length())
