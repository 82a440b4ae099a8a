"""Which tokens make a latent fire: activation-weighted lift over how common each token is."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.dictionaries import Dictionary
from sae.errors import InputError

_MERGE_ABOVE = 4_000_000  # waiting pairs; bounds memory between merges


class InputToken(NamedTuple):
    """One token of a latent's evidence."""

    token: int
    share: float
    """Share of the latent's activation that falls on this token."""
    lift: float
    """That share over the token's share of the text: 1 = no more than chance."""
    firings: int
    """Rows on which the latent fired at this token."""


class LatentSummary(NamedTuple):
    """One latent over all rows seen."""

    firings: int
    density: float
    """Share of rows on which it fired."""
    mean: float
    """Mean activation where it fired, raw units."""
    clarity: float
    """1 - H(q) / H(p): q = tokens weighted by its activation, p = the text. 1 = one token, 0 = any."""


class InputTokens:
    """Activation and firings of every latent on every token, gathered in one pass.

    For latent i, token t: share q_i(t) = sum of its activation at t over its whole activation, p(t) =
    share of rows at t, lift = q_i(t) / p(t). Tokens are ranked by q log(q / p), a token's part in the
    Kullback-Leibler divergence, so that neither common tokens nor single accidents come first. Memory
    grows with the (latent, token) pairs that occur, not with latents times vocabulary.
    """

    def __init__(self, n_latents: int, vocabulary: int) -> None:
        self._n_latents = n_latents
        self._vocabulary = vocabulary
        self._token_counts = np.zeros(vocabulary, dtype=np.int64)
        self._keys = np.empty(0, dtype=np.int64)
        self._mass = np.empty(0)
        self._firings = np.empty(0, dtype=np.int64)
        self._waiting: list[tuple[np.ndarray, np.ndarray]] = []
        self._n_waiting = 0

    @classmethod
    def gather(
        cls,
        dictionary: Dictionary,
        batches: Iterable[tuple[Float[Tensor, "rows d_model"], Int[Tensor, " rows"]]],
        vocabulary: int,
    ) -> InputTokens:
        """Encodes batches of (activations, token of each row).

        Raises:
            InputError: if there is no row.
        """
        gathered = cls(dictionary.n_latents, vocabulary)
        dtype = dictionary.directions.dtype
        with torch.inference_mode():
            for x, tokens in batches:
                code = dictionary.encode_sparse(x.to(dictionary.device, dtype))
                rows = code.rows.cpu()
                gathered.add(tokens, tokens[rows], code.indices.cpu(), code.values.cpu())
        if not gathered._token_counts.any():
            raise InputError("no rows to read latents from; the cache is empty.")
        gathered._merge()
        return gathered

    def add(
        self,
        tokens: Int[Tensor, " rows"],
        token_of_entry: Int[Tensor, " active"],
        latent_of_entry: Int[Tensor, " active"],
        values: Float[Tensor, " active"],
    ) -> None:
        """Adds a batch: its tokens, and for each non-zero latent where it fired and how strongly."""
        self._token_counts += np.bincount(tokens.numpy(), minlength=self._vocabulary)
        keys = latent_of_entry.numpy().astype(np.int64) * self._vocabulary + token_of_entry.numpy()
        self._waiting.append((keys, values.double().numpy()))
        self._n_waiting += len(keys)
        if self._n_waiting > _MERGE_ABOVE:
            self._merge()

    def _merge(self) -> None:
        keys = np.concatenate([self._keys, *(keys for keys, _ in self._waiting)])
        mass = np.concatenate([self._mass, *(values for _, values in self._waiting)])
        firings = np.concatenate([self._firings, np.ones(self._n_waiting, dtype=np.int64)])
        self._keys, place = np.unique(keys, return_inverse=True)
        self._mass = np.bincount(place, weights=mass, minlength=len(self._keys))
        self._firings = np.bincount(place, weights=firings, minlength=len(self._keys)).astype(np.int64)
        self._waiting, self._n_waiting = [], 0

    def _of(self, latent: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, mass and firings of a latent."""
        if not 0 <= latent < self._n_latents:
            raise InputError(f"`latent` must be in [0, {self._n_latents - 1}], got {latent}.")
        if self._waiting:
            self._merge()
        here = slice(
            *np.searchsorted(self._keys, [latent * self._vocabulary, (latent + 1) * self._vocabulary])
        )
        return self._keys[here] - latent * self._vocabulary, self._mass[here], self._firings[here]

    def top(self, latent: int, count: int) -> list[InputToken]:
        """The tokens that say most about a latent; empty if it never fired."""
        tokens, mass, firings = self._of(latent)
        if not len(tokens):
            return []
        share = mass / mass.sum()
        lift = share / self._base_rate()[tokens]
        best = np.argsort(-share * np.log(lift), kind="stable")[:count]
        return [InputToken(int(tokens[i]), float(share[i]), float(lift[i]), int(firings[i])) for i in best]

    def summary(self, latent: int) -> LatentSummary:
        """How often and how clearly a latent fires."""
        _, mass, firings = self._of(latent)
        n = int(firings.sum())
        if n == 0:
            return LatentSummary(0, 0.0, 0.0, 0.0)
        clarity = 1.0 - _entropy(mass) / max(_entropy(self._token_counts), 1e-12)
        return LatentSummary(n, n / int(self._token_counts.sum()), float(mass.sum() / n), clarity)

    def _base_rate(self) -> np.ndarray:
        return self._token_counts / self._token_counts.sum()


def _entropy(weights: np.ndarray) -> float:
    """Entropy (nats) of non-negative weights."""
    p = weights[weights > 0] / weights.sum()
    return float(-(p * np.log(p)).sum())
