"""What is known of one latent: the types that evidence, tables and the report share."""

from __future__ import annotations

from typing import NamedTuple

FEWEST_FIRINGS = 50
"""Rows on which a latent must have fired to be called clear, or clearer than chance: fewer are anecdotes."""


class InputToken(NamedTuple):
    """One token that a latent fires on (or right after)."""

    token: int
    share: float
    """Share of the latent's activation that falls on this token."""
    lift: float
    """That share over the token's share of the rows seen: 1 = no more than chance."""
    lift_low: float
    """Lower end of the 95 % interval of `lift`."""
    lift_high: float
    """Upper end of it."""
    firings: int
    """Rows on which the latent fired at this token."""


class OutputToken(NamedTuple):
    """One token that a direction raises or lowers."""

    token: int
    logit: float
    """Change of the token's logit over the vocabulary's mean, per unit along the direction after the norm."""
    cosine: float
    """Cosine between the direction and the token's folded, centred column of W_U."""


class LatentSummary(NamedTuple):
    """One latent over all rows seen; zeros if it never fired."""

    firings: int
    density: float
    """Share of rows on which it fired."""
    mean: float
    """Mean activation where it fired, raw units."""
    largest: float
    """Largest activation, raw units."""
    clarity: float
    """1 - H(q) / H(p): q = tokens weighted by its activation, p = all rows. 1 = one token, 0 = any."""
    effective_tokens: float
    """exp(H(q)): on how many kinds of token it fires, as many equally frequent ones would count."""


class Histogram(NamedTuple):
    """Activations of one latent where it fired, in bins of equal ratio."""

    edges: list[float]
    """Bin edges, raw units, rising: one more than `counts`; both empty if it never fired."""
    counts: list[int]
    """Firings in each bin; the first and the last are not empty."""


class Context(NamedTuple):
    """A stretch of text around one firing, with the latent's activation at every token."""

    sequence: int
    """Row of the cache's `token_ids`."""
    begin: int
    """Position of the first token shown within its sequence."""
    tokens: list[int]
    activations: list[float]
    """One per token, raw units; 0 where the latent did not fire, or the cache has no row."""
    peak: int
    """Index (into `tokens`) of the firing that this context was chosen for."""
    quantile: float
    """Share of the latent's firings that are no stronger than this one, from its histogram."""


class Ablation(NamedTuple):
    """What the model itself says when the latent is set to zero where it fires."""

    raised: list[tuple[int, float]]
    """Tokens that lose most, and their mean loss of logit over the vocabulary's mean: what it promoted."""
    lowered: list[tuple[int, float]]
    """Tokens that gain most, and their mean loss of logit (negative): what it suppressed."""
    kl: float
    """Mean KL divergence (nats) from the clean next-token distribution at these positions."""
    random_kl: float
    """The same when random directions of equal length are subtracted instead, mean of four."""
    random_change: float
    """Their largest mean loss of logit, mean of four: chance beside `raised` and, negated, `lowered`."""
    positions: int
    """Firings measured."""


class NullScores(NamedTuple):
    """The 95th percentile of the same score among random directions; beside each score, what chance gives.

    Random directions are made to fire as often as the latent before they are scored.
    """

    clarity: float
    share: float
    """Of their most telling input token (lifts cannot be compared: that of a rare token is larger)."""
    previous_share: float
    """Of their most telling token one position before."""
    cosine: float
    """Of their top output token."""
    logit: float
    """Of their top output token."""


class LatentReading(NamedTuple):
    """What is known of one latent."""

    latent: int
    summary: LatentSummary
    input_tokens: list[InputToken]
    """Tokens it fires on, the most telling (share x log lift) first."""
    previous_tokens: list[InputToken]
    """Tokens right before those."""
    output_tokens: list[OutputToken]
    """Tokens it raises; empty where the model has no causal head."""
    lowered_tokens: list[OutputToken]
    """Tokens it lowers, the lowest first."""
    top_contexts: list[Context]
    """Where it fires most strongly, one for each sequence, exact over all rows seen."""
    sampled_contexts: list[Context]
    """A uniform sample of its firings, strongest first: what it does most of the time."""
    histogram: Histogram
    ablation: Ablation | None
    """Measured for a sample of latents only."""
    null: NullScores | None
    """None for a latent that never fired."""
