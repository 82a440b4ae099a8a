"""What a sparse code costs to write down, in bits."""

from __future__ import annotations

import math

from sae.errors import InputError

VALUE_BITS = 8
"""Bits of each coefficient's magnitude: finer ones change FVU in the third digit."""


def bits_per_row(n_latents: int, l0: int | float, signed: bool) -> float:
    """log2 C(n_latents, l0) + 8 l0 bits, and one more a coefficient where it has a sign.

    The first term says which latents fire, all choices counted alike; a code that prefers some of them could
    be written shorter. A wide dictionary pays for its width here, which a comparison at equal L0 forgets.

    Args:
        n_latents: latents to choose from.
        l0: mean number of coefficients a row; need not be whole.
        signed: whether coefficients have both signs.

    Raises:
        InputError: if l0 does not lie in [0, n_latents].

    >>> [round(bits_per_row(4, 2, signed), 6) for signed in (False, True)]  # 6 choices
    [18.584963, 20.584963]
    """
    if not 0 <= l0 <= n_latents:
        raise InputError(f"`l0` must lie in [0, n_latents={n_latents}], got {l0:g}.")
    log_choices = math.lgamma(n_latents + 1) - math.lgamma(l0 + 1) - math.lgamma(n_latents - l0 + 1)
    return log_choices / math.log(2) + (VALUE_BITS + signed) * l0
