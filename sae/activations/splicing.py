"""Running a language model with a dictionary's reconstruction in place of its residual stream."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from sae.activations.first_tokens import FirstTokens, watching_first_tokens
from sae.activations.hookpoints import visiting
from sae.activations.language_model import LanguageModel
from sae.errors import InputError
from sae.ops.sparse import SparseLatents


@runtime_checkable
class Coder(Protocol):
    """What a splice needs of a dictionary: `sae.Dictionary` has it."""

    d_model: int
    n_latents: int

    @property
    def directions(self) -> Tensor:
        """One unit row per latent."""
        ...

    def encode_sparse(self, x: Tensor) -> SparseLatents:
        """The code of x, one CSR row per vector."""
        ...

    def decode_sparse(self, latents: SparseLatents) -> Tensor:
        """The reconstruction, one row per CSR row."""
        ...


class Splice:
    """What a splice saw in the last forward pass."""

    def __init__(self, n_latents: int) -> None:
        self._n_latents = n_latents
        self._code: SparseLatents | None = None
        self._leading: torch.Size = torch.Size()

    @property
    def code(self) -> SparseLatents:
        """Latents of the clean residual stream, before any edit, in CSR form: one row per token.

        Raises:
            InputError: before the first forward pass.
        """
        if self._code is None:
            raise InputError("nothing is recorded yet; run the model inside the `with sae.splice(...)`.")
        return self._code

    @property
    def latents(self) -> Float[Tensor, "batch context n_latents"]:
        """The same, dense."""
        return self.code.to_dense(self._n_latents).reshape(*self._leading, self._n_latents)

    def _record(self, code: SparseLatents, leading: torch.Size) -> None:
        self._code, self._leading = code, leading


@contextlib.contextmanager
def splice(
    model: PreTrainedModel | LanguageModel,
    hookpoint: str,
    dictionary: Coder,
    *,
    keep_error: bool = False,
    scale: Mapping[int, int | float] | None = None,
    clamp: Mapping[int, int | float] | None = None,
    gradients: bool = False,
    skip_first_position: bool = False,
) -> Iterator[Splice]:
    """Replaces the residual stream by its reconstruction, in every forward pass inside the `with`.

    With x the residual stream at a token, z its latents and z' the edited ones, the model goes on with

        decode(z')                          by default
        x + decode(z') - decode(z)          with `keep_error`: the reconstruction's error is added back,
                                            so the edit alone changes the model, and no edit nothing

    Splices of several hookpoints can be nested; each sees what the ones below it left. Only `model` is
    hooked, and no longer than the `with`, whatever happens inside.

    Args:
        model: any supported transformers model, or what `sae.load_language_model` gives.
        hookpoint: where the dictionary was trained, e.g. `resid.12`.
        dictionary: trained or fitted; what `sae.load` gives. Computes in its own dtype, on its own device.
        keep_error: add back what the dictionary does not reconstruct.
        scale: latent -> factor on its activation wherever it fires: 0 ablates it, 2 doubles it.
        clamp: latent -> activation, raw units, that it is set to at every token, firing or not (steering).
        gradients: make `code.values` a leaf, so that `torch.autograd.grad(loss, s.code.values)`
            attributes the loss to latents, with the error held fixed where it is kept. Without it,
            gradients flow through the latents to the model's inputs and parameters.
        skip_first_position: the first token of each sequence (in `model.generate`, of the prompt) keeps its
            residual stream, whatever the edit, and has no latents: for dictionaries trained without it.

    Yields:
        A `Splice`, whose `code` and `latents` are those of the last forward pass.

    Raises:
        InputError: if the model lacks the hookpoint, its width is not the dictionary's, an edit or a wanted
            gradient is impossible, or it cannot be told which token is the first.

    References:
        Scaling Monosemanticity, Templeton et al. 2024: clamping, and the error kept in place.
        Sparse Feature Circuits, Marks et al. 2024, arXiv 2403.19647: attribution through the error term.

    Example:
        >>> with sae.splice(model, "resid.3", dictionary, clamp={17: 40.0}, keep_error=True) as s:
        ...     steered = model(input_ids).logits  # doctest: +SKIP
    """
    model = model.model if isinstance(model, LanguageModel) else model
    _check(model, hookpoint, dictionary, gradients)
    edit = _Edit(dictionary, scale or {}, clamp or {})
    record = Splice(dictionary.n_latents)
    watching = watching_first_tokens(model) if skip_first_position else contextlib.nullcontext()
    with watching as first:
        replace = _replacement(dictionary, edit, record, keep_error, gradients, first)
        with visiting(model, hookpoint, replace):
            yield record


def _replacement(
    dictionary: Coder,
    edit: _Edit,
    record: Splice,
    keep_error: bool,
    gradients: bool,
    first: FirstTokens | None,
) -> Callable[[Tensor], Tensor]:
    """What goes in place of the residual stream, as a function of it."""

    def replace(x: Tensor) -> Tensor:
        own = dictionary.directions
        flat = x.reshape(-1, dictionary.d_model)
        acting = None if first is None else ~first(x).flatten()
        rows = (flat if acting is None else flat[acting]).to(own.device, own.dtype)
        code = dictionary.encode_sparse(rows)
        clean = code
        if gradients:
            # A leaf of its own, beside the code that the error is taken from: if the error moved with
            # the latents, no latent would matter to what comes out.
            clean = code._replace(values=code.values.detach())
            code = clean._replace(values=clean.values.clone().requires_grad_())
        record._record(code if acting is None else code.spread(acting.to(own.device)), x.shape[:-1])
        if not len(rows):
            return x
        new = edit.decode(code)
        if keep_error:
            new = rows + (new - dictionary.decode_sparse(clean))
        if torch.is_grad_enabled() and x.requires_grad and not new.requires_grad:
            raise InputError(
                f"{type(dictionary).__name__} gives no gradient to its input, and the model asks for one;"
                " run under torch.no_grad(), or with `keep_error`, which passes it through the error."
            )
        new = new.to(x.device, x.dtype)
        if acting is not None:
            new = flat.index_put((acting,), new)
        return new.reshape(x.shape)

    return replace


class _Edit:
    """Latents scaled and clamped."""

    def __init__(
        self, dictionary: Coder, scale: Mapping[int, int | float], clamp: Mapping[int, int | float]
    ) -> None:
        for latent, value in [*scale.items(), *clamp.items()]:
            if not isinstance(latent, int):
                raise InputError(f"latents are named by number, got {latent!r}.")
            if not math.isfinite(value):
                raise InputError(f"`scale` and `clamp` take finite numbers, got {value} for latent {latent}.")
            if not 0 <= latent < dictionary.n_latents:
                raise InputError(f"latents are numbered 0 to {dictionary.n_latents - 1}, got {latent}.")
        both = sorted({*scale} & {*clamp})
        if both:
            raise InputError(f"latents {both} are both in `scale` and in `clamp`; choose one.")
        self._dictionary = dictionary
        own = dictionary.directions
        self._factor: Tensor | None = None
        self._added: Tensor | None = None
        if scale or clamp:
            self._factor = torch.ones(dictionary.n_latents, dtype=own.dtype, device=own.device)
            for latent, factor in {**scale, **dict.fromkeys(clamp, 0.0)}.items():
                self._factor[latent] = factor
        if clamp:
            values = torch.tensor(list(clamp.values()), dtype=own.dtype, device=own.device)
            # Every decoder is affine in its latents, so a latent at value v adds v times its direction.
            self._added = values @ own[list(clamp)].detach()

    def decode(self, code: SparseLatents) -> Tensor:
        """The reconstruction from the edited code."""
        if self._factor is not None:
            code = code._replace(values=code.values * self._factor[code.indices])
        x_hat = self._dictionary.decode_sparse(code)
        return x_hat if self._added is None else x_hat + self._added


def _check(model: PreTrainedModel, hookpoint: str, dictionary: Coder, gradients: bool) -> None:
    if gradients and not torch.is_grad_enabled():
        raise InputError("`gradients` needs autograd; leave torch.no_grad() or inference_mode().")
    width = model.config.get_text_config().hidden_size
    if width != dictionary.d_model:
        raise InputError(
            f"the dictionary has d_model={dictionary.d_model}, {type(model).__name__} has {width} at"
            f" {hookpoint}; it was trained on another model."
        )
