"""`resid.L`: the residual stream after L blocks, and a forward pass that stops once it has them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedModel

from sae.activations.language_model import find_blocks
from sae.errors import InputError

Read = Callable[[Int[Tensor, "batch context"]], dict[str, Float[Tensor, "batch context d_model"]]]


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


@contextlib.contextmanager
def reading(model: PreTrainedModel, hookpoints: list[str]) -> Iterator[Read]:
    """Gives a function from token ids to the residual stream at each hookpoint.

    `resid.L` is transformers' `hidden_states[L]`, except that the last one is taken before the final
    norm. Values keep the model's dtype and device. Blocks after the last hookpoint are not run. The model
    is hooked once for all calls, and no longer than the `with`.

    Raises:
        InputError: if the model lacks a hookpoint.
    """
    check_hookpoints(model, hookpoints)
    found: dict[str, Tensor] = {}
    arguments = without_cache(model)

    def keep(name: str, x: Tensor) -> None:
        found[name] = x
        if len(found) == len(hookpoints):
            raise _AllFound

    @torch.inference_mode()
    def read(input_ids: Tensor) -> dict[str, Tensor]:
        found.clear()
        with contextlib.suppress(_AllFound):
            model(input_ids=input_ids.to(model.device, non_blocking=True).long(), **arguments)
        return {name: found[name] for name in hookpoints}

    with contextlib.ExitStack() as stack:
        for name in hookpoints:
            stack.enter_context(visiting(model, name, partial(keep, name)))
        yield read


def residuals(
    model: PreTrainedModel, input_ids: Int[Tensor, "batch context"], hookpoints: list[str]
) -> dict[str, Float[Tensor, "batch context d_model"]]:
    """The residual stream of one batch at each hookpoint; see `reading`.

    Raises:
        InputError: if the model lacks a hookpoint.
    """
    with reading(model, hookpoints) as read:
        return read(input_ids)


@contextlib.contextmanager
def visiting(
    model: PreTrainedModel, hookpoint: str, visit: Callable[[Tensor], Tensor | None]
) -> Iterator[None]:
    """Calls `visit` with the residual stream at a hookpoint, in every forward pass inside the `with`.

    A tensor that it returns takes the residual stream's place for the rest of the pass; None leaves it
    as it is. The hook is gone afterwards, whatever happened.

    Raises:
        InputError: if the model lacks the hookpoint.
    """
    check_hookpoints(model, [hookpoint])
    depth = int(hookpoint.removeprefix("resid."))
    blocks = find_blocks(model)[1]

    def before_first(_block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        new = visit(args[0] if args else kwargs["hidden_states"])
        if new is None:
            return None
        return ((new, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": new})

    def after(_block: nn.Module, _args: tuple[Any, ...], output: Any) -> Any:
        new = visit(output[0] if isinstance(output, tuple) else output)
        return (new, *output[1:]) if new is not None and isinstance(output, tuple) else new

    if depth == 0:
        handle = blocks[0].register_forward_pre_hook(before_first, with_kwargs=True)
    else:
        handle = blocks[depth - 1].register_forward_hook(after)
    try:
        yield
    finally:
        handle.remove()


def without_cache(model: PreTrainedModel) -> dict[str, bool]:
    """Arguments of a forward pass that builds no key-value cache, which nobody reads here."""
    return {"use_cache": False} if getattr(model.config.get_text_config(), "use_cache", False) else {}


class _AllFound(Exception):
    """Leaves the forward pass after the last hookpoint."""
