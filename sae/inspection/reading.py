"""Reading a dictionary: evidence, unembedding and tokenizer together, latent by latent."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sae.activations.hookpoints import residuals
from sae.activations.language_model import LanguageModel, causal_head, separator_id, unembedding
from sae.dictionaries import Dictionary
from sae.errors import InputError
from sae.inspection.ablation import measure_ablations
from sae.inspection.evidence import BINS_PER_OCTAVE, Evidence
from sae.inspection.latent import (
    FEWEST_FIRINGS,
    Ablation,
    Context,
    Histogram,
    LatentReading,
    LatentSummary,
    OutputToken,
)
from sae.inspection.null import NullDistribution, clarities, random_output_scores
from sae.inspection.output_tokens import output_tokens
from sae.inspection.token_text import TokenText

TOKENS_SHOWN = 10
_AT_ONCE = 128  # latents multiplied with the unembedding together


class TextReading(NamedTuple):
    """The strongest latents at every token of a text."""

    token_ids: list[int]
    """The separator, then the text's tokens."""
    latents: list[list[tuple[int, float]]]
    """For each token: latents that fire and their activations, raw units, strongest first."""


class Reading:
    """The evidence for a dictionary's latents, made readable."""

    def __init__(
        self,
        dictionary: Dictionary,
        hookpoint: str,
        evidence: Evidence,
        token_ids: Int[Tensor, "sequences context"],
        language_model: LanguageModel,
        cached: Bool[Tensor, "sequences context"] | None = None,
    ) -> None:
        """Puts together what is known.

        Args:
            dictionary: whose latents.
            hookpoint: where it was trained.
            evidence: gathered from a cache with this dictionary.
            token_ids: the contexts of that cache.
            language_model: the one that the cache was made with.
            cached: at which of these tokens the cache has rows; None = at all.

        Raises:
            InputError: if the model has another width than the dictionary, or its tokenizer does not
                know the cache's tokens.
        """
        self.dictionary, self.hookpoint, self.evidence = dictionary, hookpoint, evidence
        self.text = TokenText(language_model.tokenizer)
        """Shows a token id as a quoted string."""
        self.clarity = clarities(evidence.inputs)
        """Of every latent; 0 where it never fired."""
        self._token_ids, self._model, self._cached = token_ids, language_model, cached
        _check_model(dictionary, token_ids, language_model)
        self._entropies = evidence.inputs.entropies()
        self._null = NullDistribution(evidence.null)
        self._W_U = unembedding(language_model)
        self._null_output = (0.0, 0.0) if self._W_U is None else random_output_scores(self._W_U)
        self._ablations: dict[int, Ablation] = {}

    @property
    def n_latents(self) -> int:
        """Number of latents."""
        return self.dictionary.n_latents

    def check_latent(self, latent: int) -> int:
        """Returns the number; raises `InputError` if there is no such latent."""
        if not 0 <= latent < self.n_latents:
            raise InputError(f"latents are numbered 0 to {self.n_latents - 1}, got {latent}.")
        return latent

    def latent(self, latent: int) -> LatentReading:
        """All that is known of one latent.

        Raises:
            InputError: if there is no such latent.
        """
        return next(self.latents([self.check_latent(latent)]))

    def latents(self, which: Iterable[int] | None = None) -> Iterator[LatentReading]:
        """The readings of some latents, or of all, one at a time."""
        chosen = torch.tensor(list(range(self.n_latents) if which is None else which), dtype=torch.long)
        for some in chosen.split(_AT_ONCE):
            outputs: list[tuple[list[OutputToken], list[OutputToken]]] = [([], [])] * len(some)
            if self._W_U is not None:
                directions = self.dictionary.directions.detach()[some.to(self.dictionary.device)]
                outputs = output_tokens(directions.float().cpu(), self._W_U, TOKENS_SHOWN)
            for latent, (raised, lowered) in zip(some.tolist(), outputs, strict=True):
                yield self._read(latent, raised, lowered)

    def _read(self, latent: int, raised: list[OutputToken], lowered: list[OutputToken]) -> LatentReading:
        evidence, summary = self.evidence, self.summary(latent)
        return LatentReading(
            latent=latent,
            summary=summary,
            input_tokens=evidence.inputs.top(latent, TOKENS_SHOWN),
            previous_tokens=evidence.previous.top(latent, TOKENS_SHOWN),
            output_tokens=raised,
            lowered_tokens=lowered,
            top_contexts=self._contexts(latent, evidence.top),
            sampled_contexts=self._contexts(latent, evidence.sampled),
            histogram=self._histogram(latent),
            ablation=self._ablations.get(latent),
            null=self._null.beside(summary.density, *self._null_output),
        )

    def summary(self, latent: int) -> LatentSummary:
        """How often, how strongly and how clearly a latent fires."""
        firings = int(self.evidence.firings[latent])
        if firings == 0:
            return LatentSummary(0, 0.0, 0.0, 0.0, 0.0, 0.0)
        return LatentSummary(
            firings=firings,
            density=firings / self.evidence.rows,
            mean=float(self.evidence.mass[latent]) / firings,
            largest=float(self.evidence.largest[latent]),
            clarity=float(self.clarity[latent]),
            effective_tokens=float(np.exp(self._entropies[latent])),
        )

    def _histogram(self, latent: int) -> Histogram:
        counts = self.evidence.histogram[latent]
        seen = counts.nonzero().squeeze(1)
        if not len(seen):
            return Histogram([], [])
        first, last = int(seen[0]), int(seen[-1])
        bins = range(first, last + 2)
        edges = [self.evidence.lowest * 2.0 ** (i / BINS_PER_OCTAVE) for i in bins]
        return Histogram(edges, counts[first : last + 1].tolist())

    def _contexts(self, latent: int, best: dict[str, Tensor]) -> list[Context]:
        """Those kept, without repetitions of the same words."""
        found: list[Context] = []
        seen: set[tuple[int, ...]] = set()
        kept = best["value"][latent] > 0
        values, *places = (best[name][latent][kept] for name in ("value", "sequence", "begin", "peak"))
        traces = best["trace"][latent][kept].float()
        spans = places[1][:, None] + torch.arange(traces.shape[1])
        tokens = self._token_ids[places[0][:, None].long(), spans.long()].tolist()
        columns = (
            *(place.tolist() for place in places),
            tokens,
            traces.tolist(),
            self._quantiles(latent, values),
        )
        for sequence, begin, peak, words, trace, quantile in zip(*columns, strict=True):
            if tuple(words) not in seen:
                seen.add(tuple(words))
                found.append(Context(sequence, begin, words, trace, peak, quantile))
        return sorted(found, key=lambda context: -context.activations[context.peak])

    def _quantiles(self, latent: int, values: Tensor) -> list[float]:
        """Share of the latent's firings no stronger than each value, interpolated within its bin."""
        counts = self.evidence.histogram[latent].double().numpy()
        below = np.concatenate([[0.0], counts.cumsum()])
        place = np.log2(values.double().numpy() / self.evidence.lowest) * BINS_PER_OCTAVE
        place = place.clip(0.0, len(counts) - 1e-9)
        whole = place.astype(int)
        shares = (below[whole] + counts[whole] * (place - whole)) / below[-1]
        strongest = values.double().numpy() >= float(self.evidence.largest[latent])
        return np.where(strongest, 1.0, shares).tolist()

    def clearest(self, count: int = 20) -> list[LatentReading]:
        """The latents that fire on the fewest kinds of tokens, one for each top token.

        Ranked by `LatentSummary.clarity`; latents that fired on fewer than `FEWEST_FIRINGS` rows are
        left out.
        """
        firings = self.evidence.firings.numpy()
        often = (firings >= FEWEST_FIRINGS).nonzero()[0]
        found: list[int] = []
        seen: set[int] = set()
        for i in often[np.lexsort((-firings[often], -self.clarity[often].round(3)))]:
            top = self.evidence.inputs.top(int(i), 1)[0].token
            if top not in seen:
                seen.add(top)
                found.append(int(i))
            if len(found) == count:
                break
        return list(self.latents(found))

    def firing_on(self, token: int, count: int = 20) -> list[LatentReading]:
        """The latents that fire most tellingly on a token (by share x log lift)."""
        return list(self.latents(self.evidence.inputs.latents_of(token)[0][:count].tolist()))

    def raising(self, token: int, count: int = 20) -> list[tuple[int, OutputToken]]:
        """The latents whose directions have the largest cosine with a token's unembedding; may be empty."""
        if self._W_U is None:
            return []
        column = self._W_U[token]
        directions = self.dictionary.directions.detach().float().cpu()
        logits = directions @ column
        best = logits.topk(min(count, self.n_latents)).indices.tolist()
        norm = float(column.norm().clamp_min(1e-30))
        return [(i, OutputToken(token, float(logits[i]), float(logits[i]) / norm)) for i in best]

    @torch.inference_mode()
    def on_text(self, text: str, per_token: int = 5) -> TextReading:
        """Runs the model on a text and gives the strongest latents at every token.

        A position that the cache has no rows of in any context, as the first one often is, has no latents.

        Raises:
            InputError: if the text is empty, or longer than the contexts that the dictionary was
                trained on.
        """
        tokenizer = self._model.tokenizer
        tokens = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        ids = [separator_id(tokenizer), *tokens]
        context = self._token_ids.shape[1]
        if len(ids) == 1:
            raise InputError(f"`text` must have at least one token, got {text!r}.")
        if len(ids) > context:
            raise InputError(
                f"`text` must have at most {context - 1} tokens (the dictionary was trained on contexts of"
                f" {context}, separator included), got {len(ids) - 1}; shorten it."
            )
        x = residuals(self._model.model, torch.tensor([ids]), [self.hookpoint])[self.hookpoint]
        own = self.dictionary.directions
        latents = self.dictionary.encode(x[0].to(own.device, own.dtype)).float().cpu()
        if self._cached is not None:
            latents[~self._cached[:, : len(ids)].any(0)] = 0.0
        best = latents.topk(min(per_token, self.n_latents), dim=-1)
        rows = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return TextReading(ids, [[(i, v) for i, v in zip(*row, strict=True) if v > 0] for row in rows])

    def measure_ablations(self, which: Iterable[int], contexts: int = 6) -> None:
        """Measures what the model predicts without each of these latents; later readings have it.

        Nothing is measured for models without a causal head, or for latents that never fired.
        """
        if causal_head(self._model.model) is None:
            return
        top = self.evidence.top
        firings = {
            i: [
                (int(top["sequence"][i, j]), int(top["begin"][i, j] + top["peak"][i, j]))
                for j in (top["value"][i] > 0).nonzero().flatten().tolist()[:contexts]
            ]
            for i in map(self.check_latent, which)
        }
        self._ablations |= measure_ablations(
            self._model.model, self.hookpoint, self.dictionary, self._token_ids, firings, self._cached
        )


def _check_model(dictionary: Dictionary, token_ids: Tensor, language_model: LanguageModel) -> None:
    width = language_model.model.config.get_text_config().hidden_size
    if width != dictionary.d_model:
        raise InputError(
            f"the dictionary has d_model={dictionary.d_model}, {language_model.name} has {width}; it was"
            " trained on another model."
        )
    known = max(len(language_model.tokenizer), 1)
    if int(token_ids.max()) >= known:
        raise InputError(
            f"the cache has token {int(token_ids.max())}, the tokenizer of {language_model.name} knows only"
            f" {known}; it was made with another tokenizer."
        )
