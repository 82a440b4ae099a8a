"""Ways to make signed rows non-negative, and what a factorisation of the result says of the rows."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from sae.errors import InputError

# A component whose halves cancel to less than this share of it has no direction in signed space.
NO_DIRECTION = 1e-6


class SignedRows(ABC):
    """One treatment: rows to non-negative rows, and back from their codes and components to signed ones.

    Rows come less their origin, (rows, d_model): the mean where the treatment is about the mean, else the
    point that stands for zero.
    """

    halves = 1
    """Width of a non-negative row over d_model."""
    parts = 1
    """Non-negative rows that one row becomes."""
    about_mean = True
    """Whether the origin is the mean; else codes are counted from the code of the mean."""
    rule: str
    """The latents of x in the saved form, before the lengths."""

    @abstractmethod
    def nonnegative(self, rows: Float[Tensor, "rows d_model"]) -> Float[Tensor, "more_rows width"]:
        """The non-negative rows."""

    def signed(
        self, components: Float[Tensor, "n_latents width"]
    ) -> tuple[Float[Tensor, "n_latents d_model"], Float[Tensor, " n_latents"]]:
        """What the components stand for: unit directions, and lengths, zero where there is no direction."""
        return F.normalize(components, dim=1), components.norm(dim=1)

    def folded(self, codes: Float[Tensor, "more_rows n_latents"]) -> Float[Tensor, "rows n_latents"]:
        """The codes of the non-negative rows as one code for each row."""
        return codes


class Split(SignedRows):
    """[relu(x - mean), relu(mean - x)] side by side; a component stands for its first half less its other."""

    halves = 2
    rule = (
        "s = [relu(x - b_dec), relu(b_dec - x)]; z = argmin over z >= 0 of |s - z @ components|^2; "
        "latents = z * |components[:, :d_model] - components[:, d_model:]| (row norms, those below "
        f"{NO_DIRECTION:g} count as 0)"
    )

    def nonnegative(self, rows: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows width"]:
        """(rows, d_model) to (rows, 2 d_model): positive part, then negative part."""
        return torch.cat([rows.clamp(min=0), (-rows).clamp(min=0)], dim=1)

    def signed(
        self, components: Float[Tensor, "n_latents width"]
    ) -> tuple[Float[Tensor, "n_latents d_model"], Float[Tensor, " n_latents"]]:
        """H⁺[j] - H⁻[j]; where the halves cancel the direction is H⁺[j], of length zero."""
        positive, negative = components.chunk(2, dim=1)
        signed = positive - negative
        length = signed.norm(dim=1)
        exists = length > NO_DIRECTION
        directions = F.normalize(torch.where(exists[:, None], signed, positive), dim=1)
        return directions, torch.where(exists, length, 0)


class Stack(SignedRows):
    """relu(x - mean), and relu(mean - x) as a further row; x's code is the one's less the other's.

    References:
        lucid's LayerNMF (https://github.com/tensorflow/lucid), which stacks the two parts of signed
        attributions along the samples; it then codes raw rows, here both parts are coded.
    """

    parts = 2
    rule = (
        "z(s) = argmin over z >= 0 of |s - z @ components|^2; "
        "latents = z(relu(x - b_dec)) - z(relu(b_dec - x))"
    )

    def nonnegative(self, rows: Float[Tensor, "rows d_model"]) -> Float[Tensor, "more_rows d_model"]:
        """(rows, d_model) to (2 rows, d_model): all positive parts, then all negative parts."""
        return torch.cat([rows.clamp(min=0), (-rows).clamp(min=0)])

    def folded(self, codes: Float[Tensor, "more_rows n_latents"]) -> Float[Tensor, "rows n_latents"]:
        """Codes of the positive parts less those of the negative parts."""
        positive, negative = codes.chunk(2)
        return positive - negative


class Shift(SignedRows):
    """X - floor, the floor being the least value that each coordinate has in the rows of the fit.

    A later row that lies below the floor somewhere is taken to lie on it there.
    """

    about_mean = False
    rule = (
        "z = argmin over z >= 0 of |relu(x - floor) - z @ components|^2; "
        "latents = z - mean_code (mean_code is the z of b_dec)"
    )

    def nonnegative(self, rows: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows d_model"]:
        """The rows, clamped at the floor."""
        return rows.clamp(min=0)


class NoTreatment(SignedRows):
    """The rows as they are: they must be non-negative."""

    about_mean = False
    rule = (
        "z = argmin over z >= 0 of |x - z @ components|^2, for x >= 0; "
        "latents = z - mean_code (mean_code is the z of b_dec)"
    )

    def nonnegative(self, rows: Float[Tensor, "rows d_model"]) -> Float[Tensor, "rows d_model"]:
        """The rows themselves.

        Raises:
            InputError: if one of them has a negative entry.
        """
        if len(rows) and (least := rows.min().item()) < 0:
            others = ", ".join(f'"{name}"' for name in TREATMENTS if name != "none")
            raise InputError(
                f'rows must be non-negative for signs="none", got {least:g}; give `signs` a treatment of '
                f"negative entries ({others}), or use SemiNMF."
            )
        return rows


TREATMENTS: dict[str, SignedRows] = {
    "split": Split(),
    "shift": Shift(),
    "stack": Stack(),
    "none": NoTreatment(),
}
"""By the name that `NMF(signs=...)` takes."""
