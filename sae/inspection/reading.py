"""Reading a dictionary: the evidence for each latent, as text."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from sae.activations.cache import ActivationCache
from sae.activations.language_model import LanguageModel, unembedding
from sae.dictionaries import Dictionary
from sae.errors import InputError
from sae.inspection.input_tokens import InputToken, InputTokens, LatentSummary
from sae.inspection.output_tokens import OutputToken, output_tokens
from sae.inspection.token_text import TokenText

FEWEST_FIRINGS = 50
"""Rows on which a latent must have fired to be called clear: fewer are anecdotes."""


class LatentReading(NamedTuple):
    """What is known of one latent."""

    latent: int
    summary: LatentSummary
    input_tokens: list[InputToken]
    output_tokens: list[OutputToken]
    """Empty where the model has no causal head."""


class Reading:
    """The evidence for a dictionary's latents, from the rows of a cache and the model's unembedding."""

    def __init__(
        self,
        dictionary: Dictionary,
        cache: ActivationCache,
        hookpoint: str,
        language_model: LanguageModel,
        max_rows: int = 200_000,
    ) -> None:
        """Encodes up to `max_rows` train rows (a random sample, as rows lie mixed on disk).

        Raises:
            InputError: if the dictionary does not have the width of the cache's rows.
        """
        if dictionary.d_model != cache.d_model(hookpoint):
            raise InputError(
                f"the dictionary has d_model={dictionary.d_model}, the cache {cache.folder} has"
                f" {cache.d_model(hookpoint)} at {hookpoint}; they are not of one run."
            )
        self._dictionary = dictionary
        self._text = TokenText(language_model.tokenizer)
        self._W_U = unembedding(language_model)
        self._inputs = InputTokens.gather(
            dictionary,
            rows_with_tokens(cache, hookpoint, max_rows),
            vocabulary=int(cache.token_ids.max()) + 1,
        )

    def latent(self, latent: int, tokens: int = 10) -> LatentReading:
        """The evidence for one latent.

        Raises:
            InputError: if there is no such latent.
        """
        inputs = self._inputs.top(latent, tokens)
        outputs = []
        if self._W_U is not None:
            direction = self._dictionary.directions[latent].detach().float().cpu()
            outputs = output_tokens(direction, self._W_U, tokens)
        return LatentReading(latent, self._inputs.summary(latent), inputs, outputs)

    def clearest(self, count: int = 20) -> list[LatentReading]:
        """The latents that fire on the fewest kinds of tokens, one for each top token.

        Ranked by `LatentSummary.clarity`; latents that fired on fewer than `FEWEST_FIRINGS` rows are
        left out.
        """
        summaries = [(i, self._inputs.summary(i)) for i in range(self._dictionary.n_latents)]
        often = [(i, s) for i, s in summaries if s.firings >= FEWEST_FIRINGS]
        found: list[LatentReading] = []
        seen: set[int] = set()
        for i, _ in sorted(often, key=lambda item: (-round(item[1].clarity, 3), -item[1].firings)):
            top = self._inputs.top(i, 1)[0].token
            if top not in seen:
                seen.add(top)
                found.append(self.latent(i))
            if len(found) == count:
                break
        return found

    def table(self, latents: list[LatentReading]) -> str:
        """One line per latent: density, clarity, input tokens with lift, output tokens."""
        lines = [f"{'latent':>7} {'density':>8} {'clarity':>7}  {'fires on (share, lift)':<58} {'raises'}"]
        for reading in latents:
            inputs = "  ".join(
                f"{self._text(t.token)} {t.share:.0%} x{t.lift:,.0f}" for t in reading.input_tokens[:3]
            )
            outputs = " ".join(self._text(t.token) for t in reading.output_tokens[:4]) or "-"
            summary = reading.summary
            lines.append(
                f"{reading.latent:>7} {summary.density:>8.2%} {summary.clarity:>7.2f}  {inputs:<58} {outputs}"
            )
        return "\n".join(lines)

    def page(self, reading: LatentReading) -> str:
        """All that is known of one latent, several lines."""
        s = reading.summary
        lines = [
            f"latent {reading.latent}: fires on {s.density:.3%} of tokens ({s.firings:,} seen), mean"
            f" activation {s.mean:.3g}, clarity {s.clarity:.2f}"
        ]
        if not s.firings:
            lines = [
                f"latent {reading.latent} never fired on the rows read (dead): only its direction is known"
            ]
        if reading.input_tokens:
            lines.append(
                "\nfires on (by share x log lift)   share of activation   lift over base rate   firings"
            )
            lines += [
                f"  {self._text(t.token):<22} {t.share:>10.1%} {t.lift:>24,.1f} {t.firings:>12,}"
                for t in reading.input_tokens
            ]
        if reading.output_tokens:
            lines.append("\nraises the logit of   by (per unit)   cosine with W_U")
            lines += [
                f"  {self._text(t.token):<22} {t.logit:>8.2f} {t.cosine:>14.2f}"
                for t in reading.output_tokens
            ]
        return "\n".join(lines)


def rows_with_tokens(
    cache: ActivationCache, hookpoint: str, max_rows: int
) -> Iterator[tuple[Float[Tensor, "rows d_model"], Int[Tensor, " rows"]]]:
    """Train rows, each with the token it was computed at, up to `max_rows`.

    Raises:
        InputError: if the cache does not know where its rows come from.
    """
    token_ids = cache.token_ids
    given = 0
    for batch in cache.batches("train", hookpoint, 8192):
        if batch.sequence is None or batch.position is None:
            raise InputError(
                f"the cache {cache.folder} holds no token ids; directions cannot be read from it."
            )
        tokens = token_ids[batch.sequence.long(), batch.position.long()].long()
        yield batch.x[: max_rows - given], tokens[: max_rows - given]
        given += len(tokens)
        if given >= max_rows:
            break
