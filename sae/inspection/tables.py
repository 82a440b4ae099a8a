"""Readings as text for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sae.inspection.latent import Context, InputToken, LatentReading, OutputToken
from sae.inspection.reading import Reading, TextReading

_BEFORE, _AFTER = 14, 6  # tokens shown around a peak
_BARS = "▁▂▃▄▅▆▇█"


def latent_table(readings: Sequence[LatentReading], text: Callable[[int], str]) -> str:
    """One line per latent: density, clarity and its null, input tokens with lift, output tokens."""
    header = f"{'latent':>7} {'density':>8} {'clarity':>7} {'(null)':>6}"
    lines = [f"{header}  {'fires on (share, lift)':<56} raises"]
    for reading in readings:
        inputs = "  ".join(f"{text(t.token)} {t.share:.0%} x{t.lift:,.0f}" for t in reading.input_tokens[:3])
        outputs = " ".join(text(t.token) for t in reading.output_tokens[:4]) or "-"
        summary = reading.summary
        null = f"({reading.null.clarity:.2f})" if reading.null else "(-)"
        lines.append(
            f"{reading.latent:>7} {summary.density:>8.2%} {summary.clarity:>7.2f} {null:>6}"
            f"  {inputs or 'nothing: dead on the rows read':<56} {outputs}"
        )
    return "\n".join(lines)


def latent_page(reading: LatentReading, text: Callable[[int], str]) -> str:
    """All that is known of one latent, several lines; each score beside what random directions reach."""
    s, null = reading.summary, reading.null
    if null is None:
        lines = [f"latent {reading.latent} never fired on the rows read (dead): only its direction is known"]
    else:
        lines = [
            f"latent {reading.latent}: fires on {s.density:.3%} of tokens ({s.firings:,} seen), mean"
            f" activation {s.mean:.3g}, largest {s.largest:.3g}",
            f"clarity {s.clarity:.2f} (random directions: {null.clarity:.2f}): fires as if on"
            f" {s.effective_tokens:,.1f} kinds of token",
            *_inputs("fires on", reading.input_tokens, null.share, text),
            *_inputs("right after", reading.previous_tokens, null.previous_share, text),
        ]
    beside = "" if null is None else f"   (random directions: {null.logit:.2f}, {null.cosine:.2f})"
    for title, tokens in (("raises", reading.output_tokens), ("lowers", reading.lowered_tokens)):
        lines += _outputs(title, tokens, beside if title == "raises" else "", text)
    if reading.ablation:
        a = reading.ablation
        changes = "  ".join(f"{text(token)} {change:+.2f}" for token, change in a.raised[:6])
        lines += [
            f"\nwithout it, at {a.positions} of its strongest firings: KL {a.kl:.3g} nats (random"
            f" directions of its length: {a.random_kl:.3g})",
            f"  logits it had raised: {changes}   (random directions' largest: {a.random_change:+.2f})",
        ]
    for title, contexts in (
        ("strongest contexts", reading.top_contexts[:6]),
        ("a fair sample of its firings", reading.sampled_contexts[:6]),
    ):
        if contexts:
            lines.append(f"\n{title} (activation, share of firings no stronger, text with [firing])")
            lines += [_context(context, s.largest, text) for context in contexts]
    return "\n".join(lines)


def token_tables(reading: Reading, token: int, count: int) -> str:
    """The latents that fire on a token, and those that raise it."""
    text = reading.text
    firing = reading.firing_on(token, count)
    parts = [f"latents that fire on {text(token)}, by share x log lift:"]
    parts += [latent_table(firing, text)] if firing else ["  none"]
    raising = reading.raising(token, count)
    if raising:
        parts.append(f"\nlatents whose direction raises {text(token)} most:")
        parts.append(f"{'latent':>7} {'logit':>7} {'cosine':>7}  fires on")
        for (latent, output), found in zip(raising, reading.latents([i for i, _ in raising]), strict=True):
            inputs = " ".join(text(t.token) for t in found.input_tokens[:4]) or "nothing (dead)"
            parts.append(f"{latent:>7} {output.logit:>7.2f} {output.cosine:>7.2f}  {inputs}")
    return "\n".join(parts)


def text_table(reading: Reading, found: TextReading) -> str:
    """The strongest latents at each token of a text, each with the token it fires on most."""
    latents = sorted({i for row in found.latents for i, _ in row})
    tops = {r.latent: r.input_tokens[:1] for r in reading.latents(latents)}
    lines = [f"{'token':<20} strongest latents: activation (most telling token, its share)"]
    for token, row in zip(found.token_ids, found.latents, strict=True):
        cells = [f"{i}: {value:.3g} ({_most_telling(tops[i], reading)})" for i, value in row]
        lines.append(f"{reading.text(token):<20} {'   '.join(cells) or '-'}")
    return "\n".join(lines)


def _most_telling(tops: list[InputToken], reading: Reading) -> str:
    if not tops:
        return "never fired in the cache"
    return f"{reading.text(tops[0].token)} {tops[0].share:.0%}" if tops[0].share >= 0.05 else "no one token"


def _inputs(title: str, tokens: list[InputToken], null: float, text: Callable[[int], str]) -> list[str]:
    if not tokens:
        return []
    header = f"\n{title:<22} {'share':>8} {'lift':>9}   95 % interval       firings"
    rows = [
        f"  {text(t.token):<20} {t.share:>8.1%} {t.lift:>9,.1f}   {t.lift_low:,.1f} to {t.lift_high:,.1f}"
        f"{'':<6}{t.firings:>8,}"
        for t in tokens
    ]
    return [f"{header}   (share of random directions' best: {null:.0%})", *rows]


def _outputs(title: str, tokens: list[OutputToken], beside: str, text: Callable[[int], str]) -> list[str]:
    if not tokens:
        return []
    header = f"\n{title:<22} {'logit':>8} {'cosine':>9}{beside}"
    return [header, *(f"  {text(t.token):<20} {t.logit:>8.2f} {t.cosine:>9.2f}" for t in tokens)]


def _context(context: Context, largest: float, text: Callable[[int], str]) -> str:
    low, high = max(0, context.peak - _BEFORE), context.peak + _AFTER + 1
    pieces = []
    for token, activation in list(zip(context.tokens, context.activations, strict=True))[low:high]:
        piece = text(token)[1:-1]
        if activation > 0:
            level = _BARS[min(len(_BARS) - 1, int(len(_BARS) * activation / max(largest, 1e-30)))]
            piece = f"[{piece}{level}]"
        pieces.append(piece)
    peak = context.activations[context.peak]
    return f"  {peak:>8.3g} {context.quantile:>5.0%}  {''.join(pieces)}"
