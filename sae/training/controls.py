"""Controls: dictionaries of which a part may not learn, to show what learning that part is worth."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn

from sae.dictionaries import SparseAutoencoder
from sae.dictionaries.linear_encoder import LinearEncoder
from sae.dictionaries.penalised import Penalised
from sae.errors import InputError
from sae.training.names import SINGLE
from sae.training.recipe import Recipe

Control = Literal["decoder", "soft_decoder", "encoder"]
AskedControls = Control | dict[str, Control] | None
LEAST_COSINE = 0.8
"""How near to where it began a direction stays under `soft_decoder`."""
_FACTOR_RATE, _FACTOR_STEP = 0.05, 0.1
_SOME = 2048  # directions at a time, so that what lies between stays in a cache


@dataclass(frozen=True)
class Controls:
    """What `model.controls` says: of each dictionary the part that keeps its random start, or of none.

    decoder: the directions never move; the encoder and all biases learn.
    soft_decoder: the directions learn, within a cosine of 0.8 to where they began.
    encoder: which latents fire, and in which proportions, never changes; the directions, b_dec and one
        factor common to all latents learn (`common_factor`). Where L0 is set by a target, thresholds are set
        for it once, on the data, before the first step.

    A number that such a dictionary reaches as well is none that the training as a whole has earned.

    References:
        Sanity Checks for Sparse Autoencoders: Do SAEs Beat Random Baselines?, Korznikov et al. 2026,
        arXiv 2602.14111 (frozen decoder, soft-frozen decoder, frozen encoder).
    """

    asked: AskedControls = None

    def checked(self, names: Collection[str], recipe: Recipe) -> Controls:
        """These, for a run of dictionaries of these names.

        Raises:
            InputError: for a control that is none, or of no dictionary; or if latents are to be resampled.
        """
        if self.asked is None:
            return self
        self._check_names(names)
        for control in self.asked.values() if isinstance(self.asked, dict) else (self.asked,):
            if control not in get_args(Control):
                raise InputError(
                    f"`model.controls` must be {_or(get_args(Control))}, got {control!r}; leave out what is"
                    " to learn as a whole."
                )
        if self.asked and "resample" in (ways := recipe.revival or ()):
            raise InputError(
                f"`model.revival` must be without resample under `model.controls`, got {list(ways)} and"
                f" {self.asked}: it gives latents another start; leave `revival` out, or train the controls"
                " in a run of their own."
            )
        return self

    def _check_names(self, names: Collection[str]) -> None:
        one = list(names) == [SINGLE]
        if one == isinstance(self.asked, dict):
            example = "decoder" if one else f"{{{next(iter(names))}: decoder}}"
            form = "the control of the one `model.dictionary`" if one else "a mapping from names to controls"
            raise InputError(f"`model.controls` must be {form}, such as {example}, got {self.asked!r}.")
        for name in self.asked if isinstance(self.asked, dict) else ():
            if name not in names:
                raise InputError(
                    f"`model.controls` must name some of `model.dictionaries`, {', '.join(names)}, got"
                    f" {name!r}."
                )

    def of(self, name: str) -> Control | None:
        """The control of a dictionary; None = all of it learns."""
        return self.asked.get(name) if isinstance(self.asked, dict) else self.asked

    def recipe_of(self, name: str, dictionary: SparseAutoencoder, recipe: Recipe) -> Recipe:
        """How a dictionary of the run is trained: as all are, save what would undo its control, or be idle.

        Where nothing is said, nothing is resampled, and latents whose encoder is frozen are not revived.

        Raises:
            InputError: if its kind has nothing to freeze, or is told an L0 that it could not follow.
        """
        control = self.of(name)
        if control is None:
            return recipe
        ways, l0_start = recipe.ways_for(dictionary), recipe.l0_start
        if control == "encoder":
            _check_encoder(dictionary, l0_start)
            ways = ways if recipe.revival is not None else ()
            l0_start = 1.0 if isinstance(dictionary, Penalised) else l0_start
        return replace(recipe, revival=tuple(way for way in ways if way != "resample"), l0_start=l0_start)


def freeze(dictionary: SparseAutoencoder, control: Control | None) -> None:
    """Takes the gradients from what is never to move: neither clipping nor the optimiser sees it."""
    if control == "decoder":
        dictionary.W_dec.requires_grad_(False)
    elif control == "encoder":
        for name, parameter in dictionary.named_parameters():
            if name not in ("W_dec", "b_dec"):
                parameter.requires_grad_(False)


def common_factor(derivative: Float[Tensor, ""]) -> Float[Tensor, ""]:
    """What to multiply the latents of a frozen encoder by after a step, all by the same.

    A frozen encoder cannot say how large its latents must be for directions of unit length: sixteen random
    ones that overlap sum to nearly twice a row. Where the rest of the training is free to find their size,
    the control must be too, or it is worse than the claim that it stands for.

    Args:
        derivative: of the loss by the log of the factor, the loss being 1 for a reconstruction by the mean.
            A step along it needs no memory: the loss's curvature there is about 2.
    """
    return (-_FACTOR_RATE * derivative).nan_to_num().clamp(-_FACTOR_STEP, _FACTOR_STEP).exp()


class NearStart(nn.Module):
    """Keeps unit directions within a cosine of 0.8 to where they began, by projection.

    With s the start of a direction w and c = w · s < 0.8, the nearest unit vector that is allowed is

        w <- 0.8 s + 0.6 (w - c s) / |w - c s|
    """

    start: Tensor
    """Kept in checkpoints: a run that goes on has to know it."""

    def __init__(self, directions: Float[Tensor, "n_latents d_model"]) -> None:
        super().__init__()
        self.register_buffer("start", directions.detach().clone())

    @torch.no_grad()
    def bring_back(self, directions: Float[Tensor, "n_latents d_model"]) -> None:
        """Projects those that have gone too far, in place; all others stay as they are, bit for bit."""
        for w, s in zip(directions.split(_SOME), self.start.split(_SOME), strict=True):
            cosine = torch.linalg.vecdot(w, s)[:, None]
            across = torch.addcmul(w, cosine, s, value=-1)
            length = torch.linalg.vector_norm(across, dim=1, keepdim=True)
            back = LEAST_COSINE * s + (1 - LEAST_COSINE**2) ** 0.5 * across / length
            back = torch.where(length > 1e-6, back, s)  # the opposite of s is equally far from all
            w.copy_(torch.where(cosine < LEAST_COSINE, back, w))


def _check_encoder(dictionary: SparseAutoencoder, l0_start: float | None) -> None:
    kind = type(dictionary).__name__
    if not isinstance(dictionary, LinearEncoder):
        raise InputError(f"`model.controls`: encoder needs a kind with an encoder, got {kind}.")
    if not isinstance(dictionary, Penalised):
        return
    if dictionary.target_l0 is None:
        raise InputError(
            f"`model.controls`: encoder needs a {kind} with a `target_l0`, got"
            f" sparsity_coefficient={dictionary.sparsity_coefficient}: a penalty cannot move what is frozen."
        )
    if l0_start is not None and l0_start > 1:
        raise InputError(
            f"`l0_start` must be 1 or null for a {kind} whose encoder is frozen by `model.controls`, got"
            f" {l0_start}: its L0 would stay there."
        )


def _or(words: Iterable[str]) -> str:
    *most, last = words
    return f"{', '.join(most)} or {last}"
