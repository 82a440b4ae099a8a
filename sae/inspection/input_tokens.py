"""Which tokens make latents fire: activation per (latent, token), as shares and lift with intervals."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from torch import Tensor

from sae.errors import InputError
from sae.inspection.latent import InputToken

MOST_PAIRS = 20_000_000
"""(latent, token) pairs held at once, 32 bytes each; beyond it the lightest of each latent are pooled."""
_MERGE_ABOVE = 4_000_000  # waiting pairs
_Z = 1.959964  # 95 %


class TokenCounts:
    """Activation and firings of every latent on every token, added batch by batch.

    For latent i and token t: share q_i(t) = sum of its activation at t over its whole activation, p(t) =
    share of the text's tokens that are t, lift = q_i(t) / p(t). Tokens are ranked by q log(q / p), a
    token's part in the Kullback-Leibler divergence, so that neither common tokens nor single accidents
    come first. The interval of a lift is Wilson's for the share, at Kish's effective number of firings
    (sum a)^2 / sum a^2, over p; it takes firings as independent, which those of one document are not.

    Memory grows with the pairs that occur, up to `most_pairs`. Beyond that, each latent keeps its
    heaviest tokens by name, and the mass of the others is kept as a sum.

    References:
        Probable Inference, the Law of Succession, and Statistical Inference, Wilson 1927.
        Survey Sampling, Kish 1965: the effective sample size of weighted observations.
    """

    def __init__(self, n_latents: int, vocabulary: int, most_pairs: int = MOST_PAIRS) -> None:
        self.n_latents, self.vocabulary = n_latents, vocabulary
        self._per_latent = max(1, most_pairs // n_latents)
        self._most_pairs = most_pairs
        self.text = np.zeros(vocabulary, dtype=np.int64)
        """Rows of the text at each token."""
        self._keys = np.empty(0, dtype=np.int64)  # latent * vocabulary + token, rising
        self._sums = np.empty((3, 0))  # activation, its square, firings
        self._pooled_mass = np.zeros(n_latents)
        self._pooled_pairs = np.zeros(n_latents)
        self._waiting: list[tuple[NDArray, NDArray]] = []
        self._n_waiting = 0

    def add(
        self,
        text: Int[Tensor, " rows"],
        latents: Int[Tensor, " active"],
        tokens: Int[Tensor, " active"],
        values: Float[Tensor, " active"],
    ) -> None:
        """Adds a batch.

        Args:
            text: the tokens of all its rows.
            latents: of each firing, the latent,
            tokens: the token that it counts for,
            values: and the activation.
        """
        self.text += np.bincount(text.cpu().numpy(), minlength=self.vocabulary)
        keys = latents.cpu().numpy().astype(np.int64) * self.vocabulary + tokens.cpu().numpy()
        self._waiting.append((keys, values.cpu().double().numpy()))
        self._n_waiting += len(keys)
        if self._n_waiting > max(_MERGE_ABOVE, len(self._keys)):
            self._merge()

    def _merge(self) -> None:
        if not self._waiting:
            return
        keys = np.concatenate([keys for keys, _ in self._waiting])
        values = np.concatenate([values for _, values in self._waiting])
        self._waiting, self._n_waiting = [], 0
        new, place = np.unique(keys, return_inverse=True)
        sums = [np.bincount(place, weights=w, minlength=len(new)) for w in (values, values**2, None)]
        both = np.concatenate([self._keys, new])
        self._keys, place = np.unique(both, return_inverse=True)
        added = np.concatenate([self._sums, np.stack(sums)], axis=1)
        self._sums = np.stack([np.bincount(place, weights=w, minlength=len(self._keys)) for w in added])
        if len(self._keys) > self._most_pairs:
            self._pool_the_lightest()

    def _pool_the_lightest(self) -> None:
        latents = self._keys // self.vocabulary
        heaviest_first = np.lexsort((-self._sums[0], latents))
        begin = np.searchsorted(latents, np.arange(self.n_latents))
        rank = np.empty(len(latents), dtype=np.int64)
        rank[heaviest_first] = np.arange(len(latents)) - begin[latents[heaviest_first]]
        kept = rank < self._per_latent // 2
        mass = self._sums[0][~kept]
        self._pooled_mass += np.bincount(latents[~kept], weights=mass, minlength=self.n_latents)
        self._pooled_pairs += np.bincount(latents[~kept], minlength=self.n_latents)
        self._keys, self._sums = self._keys[kept], self._sums[:, kept]

    def _of(self, latent: int) -> tuple[NDArray, NDArray]:
        """Tokens of a latent, and their sums of activation, its square, and firings."""
        if not 0 <= latent < self.n_latents:
            raise InputError(f"latents are numbered 0 to {self.n_latents - 1}, got {latent}.")
        self._merge()
        here = slice(*np.searchsorted(self._keys, [latent * self.vocabulary, (latent + 1) * self.vocabulary]))
        return self._keys[here] - latent * self.vocabulary, self._sums[:, here]

    def top(self, latent: int, count: int) -> list[InputToken]:
        """The tokens that say most about a latent; empty if it never fired.

        Raises:
            InputError: if there is no such latent.
        """
        tokens, (mass, squares, firings) = self._of(latent)
        if not len(tokens):
            return []
        whole = mass.sum() + self._pooled_mass[latent]
        share = mass / whole
        base = self.text[tokens] / self.text.sum()
        best = np.argsort(-share * np.log(share / base), kind="stable")[:count]
        low, high = wilson_interval(share[best], whole**2 / squares.sum())
        return [
            InputToken(
                token=int(tokens[i]),
                share=float(share[i]),
                lift=float(share[i] / base[i]),
                lift_low=float(low[j] / base[i]),
                lift_high=float(high[j] / base[i]),
                firings=int(firings[i]),
            )
            for j, i in enumerate(best)
        ]

    def firings(self) -> Float[np.ndarray, " n_latents"]:
        """Firings of every latent that are counted by token."""
        self._merge()
        return np.bincount(self._keys // self.vocabulary, weights=self._sums[2], minlength=self.n_latents)

    def entropies(self) -> Float[np.ndarray, " n_latents"]:
        """H(q) of every latent in nats; 0 where it never fired."""
        self._merge()
        latents = self._keys // self.vocabulary
        mass = self._sums[0]
        whole = np.bincount(latents, weights=mass, minlength=self.n_latents) + self._pooled_mass
        log_mass = np.bincount(latents, weights=mass * np.log(mass), minlength=self.n_latents)
        pooled = self._pooled_mass
        with np.errstate(divide="ignore", invalid="ignore"):
            # What was pooled counts as spread evenly over the pairs that went into it. A token pooled
            # twice counts twice, so entropy is rather over- than underestimated.
            log_mass += np.where(pooled > 0, pooled * np.log(pooled / self._pooled_pairs), 0.0)
            return np.where(whole > 0, np.log(whole) - log_mass / whole, 0.0).clip(min=0.0)

    def text_entropy(self) -> float:
        """H(p) in nats."""
        p = self.text[self.text > 0] / self.text.sum()
        return float(-(p * np.log(p)).sum())

    def latents_of(self, token: int) -> tuple[Int[np.ndarray, " found"], Float[np.ndarray, " found"]]:
        """The latents that fire on a token, by falling share x log lift, and these scores."""
        self._merge()
        here = self._keys % self.vocabulary == token
        latents, mass = self._keys[here] // self.vocabulary, self._sums[0][here]
        owner = self._keys // self.vocabulary
        whole = np.bincount(owner, weights=self._sums[0], minlength=self.n_latents) + self._pooled_mass
        share = mass / whole[latents]
        scores = share * np.log(share * self.text.sum() / max(1, self.text[token]))
        best = np.argsort(-scores, kind="stable")
        return latents[best], scores[best]

    def tensors(self) -> dict[str, Tensor]:
        """Everything, to be saved; activations in float32."""
        self._merge()
        arrays = {
            "text": self.text,
            "keys": self._keys,
            "sums": self._sums.astype(np.float32),
            "pooled": np.stack([self._pooled_mass, self._pooled_pairs]),
        }
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> TokenCounts:
        """What `tensors` gave."""
        pooled = tensors["pooled"].numpy()
        counts = cls(pooled.shape[1], len(tensors["text"]))
        counts.text, counts._keys = tensors["text"].numpy(), tensors["keys"].numpy()
        counts._sums = tensors["sums"].double().numpy()
        counts._pooled_mass, counts._pooled_pairs = pooled
        return counts


def wilson_interval(share: NDArray, n: float) -> tuple[NDArray, NDArray]:
    """Wilson's 95 % interval of a share seen in n (effective) trials."""
    centre = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z * np.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2)) / (1 + _Z**2 / n)
    return (centre - half).clip(min=0.0), (centre + half).clip(max=1.0)
