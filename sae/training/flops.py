"""Floating-point operations of training, per token."""

from __future__ import annotations


def training_flops(
    d_model: int, n_latents: int, entries: int | float, revived: int = 0
) -> tuple[int | float, int]:
    """Operations per token: 2 d n + 8 d k, and the 8 d k' that AuxK adds.

    One dense product for the pre-activations; the decoder and three gradients are products with the
    selected entries only. Adam and the selection are bound by memory and not counted.

    Args:
        d_model: width of a row.
        n_latents: size of the dictionary.
        entries: latents selected per row, k.
        revived: dead latents that AuxK selects per row, k'.

    Example:
        >>> training_flops(768, 24_576, 32)
        (37945344, 0)
    """
    return 2 * d_model * n_latents + 8 * d_model * entries, 8 * d_model * revived
