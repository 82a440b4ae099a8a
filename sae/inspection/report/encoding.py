"""What is known of latents, as the compact JSON that the report's pages read."""

from __future__ import annotations

import base64
import json
import math
import re
import zlib
from collections.abc import Callable
from typing import Any

from sae.inspection.latent import Context, InputToken, LatentReading, OutputToken

SEARCHED_TOKENS = 3
"""Tokens of each list that the table carries: the first is shown, all are searched."""

_UNSEEN = re.compile("[\x00-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069]")
_SURROGATE = re.compile("[\ud800-\udfff]")


def safe_text(text: str) -> str:
    r"""Text that neither reorders nor breaks a page: controls are spelled out, surrogates replaced.

    >>> safe_text("a\u202eb")
    'a\\u202eb'
    """
    text = _SURROGATE.sub("\ufffd", text)
    return _UNSEEN.sub(lambda match: f"\\u{ord(match.group()):04x}", text)


def number(value: float) -> float | int | None:
    """The number to four significant digits, as short as JSON can have it; None if it is not finite.

    >>> number(0.123456), number(3.0), number(float("nan"))
    (0.1235, 3, None)
    """
    if not math.isfinite(value):
        return None
    rounded = float(f"{value:.4g}")
    return int(rounded) if rounded.is_integer() else rounded


_DEFLATE_LEVEL = 4  # a quarter of the time of level 6, files a tenth larger


def script(kind: str, index: int | None, value: Any) -> bytes:
    """A data file: one call, pure ASCII, that hands `value` to the page."""
    arguments = [json.dumps(a, separators=(",", ":"), allow_nan=False) for a in (kind, index, value)]
    return f"SAE.receive({','.join(arguments)});\n".encode("ascii")


def packed(value: Any) -> str:
    """JSON, deflated, in base64: a fifth of its size, and browsers unpack it themselves."""
    data = json.dumps(value, separators=(",", ":"), allow_nan=False).encode("ascii")
    return base64.b64encode(zlib.compress(data, _DEFLATE_LEVEL)).decode("ascii")


class TokenIndex(dict[int, int]):
    """Numbers tokens in the order they are met and keeps their text, each once."""

    def __init__(self, text: Callable[[int], str]) -> None:
        super().__init__()
        self._text = text
        self.texts: list[str] = []
        """Display text of each token, by its index."""

    def __missing__(self, token: int) -> int:
        index = len(self.texts)
        self.texts.append(safe_text(self._text(token)))
        self[token] = index
        return index


class LatentTable:
    """One row of numbers per latent, by column: what the page sorts, filters and searches."""

    def __init__(self) -> None:
        self.columns: dict[str, list[Any]] = {}

    def add(self, reading: LatentReading, index: TokenIndex) -> None:
        """Appends one latent."""
        for name, value in table_row(reading, index).items():
            self.columns.setdefault(name, []).append(value)


def table_row(reading: LatentReading, index: TokenIndex) -> dict[str, Any]:
    """One latent's row of the table; None where it has no such score."""
    summary, null = reading.summary, reading.null
    first = reading.input_tokens[0] if reading.input_tokens else None
    before = reading.previous_tokens[0] if reading.previous_tokens else None
    raised = reading.output_tokens[0] if reading.output_tokens else None
    return {
        "latent": reading.latent,
        "firings": summary.firings,
        "density": number(summary.density),
        "mean": number(summary.mean),
        "largest": number(summary.largest),
        "clarity": number(summary.clarity),
        "null_clarity": number(null.clarity) if null else None,
        "effective_tokens": number(summary.effective_tokens),
        "fires_on": [index[t.token] for t in reading.input_tokens[:SEARCHED_TOKENS]],
        "share": number(first.share) if first else None,
        "lift": number(first.lift) if first else None,
        "lift_low": number(first.lift_low) if first else None,
        "lift_high": number(first.lift_high) if first else None,
        "before": [index[t.token] for t in reading.previous_tokens[:SEARCHED_TOKENS]],
        "before_lift": number(before.lift) if before else None,
        "raises": [index[t.token] for t in reading.output_tokens[:SEARCHED_TOKENS]],
        "cosine": number(raised.cosine) if raised else None,
        "null_cosine": number(null.cosine) if null and raised else None,
    }


def latent_page(reading: LatentReading, index: TokenIndex) -> dict[str, Any]:
    """All that one latent's page shows beyond its row of the table."""
    ablation = reading.ablation
    return {
        "latent": reading.latent,
        "fires_on": [_input_token(t, index) for t in reading.input_tokens],
        "before": [_input_token(t, index) for t in reading.previous_tokens],
        "raises": [_output_token(t, index) for t in reading.output_tokens],
        "lowers": [_output_token(t, index) for t in reading.lowered_tokens],
        "top": [_context(c, index) for c in reading.top_contexts],
        "sampled": [_context(c, index) for c in reading.sampled_contexts],
        "edges": [number(e) for e in reading.histogram.edges],
        "counts": reading.histogram.counts,
        "null": {name: number(v) for name, v in reading.null._asdict().items()} if reading.null else None,
        "ablation": {
            "raised": [[index[token], number(v)] for token, v in ablation.raised],
            "lowered": [[index[token], number(v)] for token, v in ablation.lowered],
            "kl": number(ablation.kl),
            "random_kl": number(ablation.random_kl),
            "random_change": number(ablation.random_change),
            "positions": ablation.positions,
        }
        if ablation
        else None,
    }


def _input_token(t: InputToken, index: TokenIndex) -> list[Any]:
    return [index[t.token], *map(number, (t.share, t.lift, t.lift_low, t.lift_high)), t.firings]


def _output_token(t: OutputToken, index: TokenIndex) -> list[Any]:
    return [index[t.token], number(t.logit), number(t.cosine)]


def _context(context: Context, index: TokenIndex) -> list[Any]:
    """Tokens by index; activations as offset, value, offset, value, ... of those that are not 0."""
    fired = [n for i, a in enumerate(context.activations) if a for n in (i, number(a))]
    tokens = [index[token] for token in context.tokens]
    return [context.sequence, context.begin, context.peak, number(context.quantile), tokens, fired]
