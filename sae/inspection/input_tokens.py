"""Which tokens make latents fire: activation per (latent, token), as shares and lift with intervals."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy.typing import NDArray
from scipy.sparse import coo_matrix, csr_matrix
from torch import Tensor

from sae.errors import InputError
from sae.inspection.latent import InputToken

MOST_PAIRS = 20_000_000
"""(latent, token) pairs held at once, 36 bytes each; beyond it the lightest of each latent are pooled."""
_MERGE_ABOVE = 4_000_000  # waiting pairs
_Z = 1.959964  # 95 %


class TokenCounts:
    """Activation and firings of every latent on every token, added batch by batch.

    For latent i and token t: share q_i(t) = sum of its activation at t over its whole activation, p(t) =
    share of the rows that are of t, lift = q_i(t) / p(t). Tokens are ranked by q log(q / p), a
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
        """Rows at each token."""
        # CSR matrices of one pattern, latents by tokens: activation, its square, firings.
        self._sums = [csr_matrix((n_latents, vocabulary)) for _ in range(3)]
        # Of what was pooled, per latent: activation, its square, firings; and how many pairs went in.
        self._pooled = np.zeros((3, n_latents))
        self._pooled_pairs = np.zeros(n_latents)
        self._waiting: list[tuple[NDArray, NDArray, NDArray]] = []
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
        waiting = (latents.cpu().int().numpy(), tokens.cpu().int().numpy(), values.cpu().double().numpy())
        self._waiting.append(waiting)
        self._n_waiting += len(values)
        if self._n_waiting > _MERGE_ABOVE:
            self._merge()

    def _merge(self) -> None:
        if not self._waiting:
            return
        latents, tokens, values = (np.concatenate(column) for column in zip(*self._waiting, strict=True))
        self._waiting, self._n_waiting = [], 0
        for i, data in enumerate((values, values**2, np.ones(len(values)))):
            # Converting adds up what falls on one pair; all is positive, so the patterns stay alike.
            self._sums[i] = self._sums[i] + coo_matrix((data, (latents, tokens)), self._sums[i].shape).tocsr()
        if self._sums[0].nnz > self._most_pairs:
            self._pool_the_lightest()

    def _pool_the_lightest(self) -> None:
        pairs = self._sums[0].tocoo()
        heaviest_first = np.lexsort((np.negative(pairs.data), pairs.row))
        first = np.asarray(self._sums[0].indptr)[pairs.row[heaviest_first]]
        rank = np.empty(pairs.nnz, dtype=np.int64)
        rank[heaviest_first] = np.arange(pairs.nnz) - first
        kept = rank < self._per_latent // 2
        lost = np.flatnonzero(~kept)
        for total, sums in zip(self._pooled, self._sums, strict=True):
            total += np.bincount(pairs.row[lost], sums.data[lost], minlength=self.n_latents)
        self._pooled_pairs += np.bincount(pairs.row[lost], minlength=self.n_latents)
        place = (pairs.row[kept], pairs.col[kept])
        self._sums = [coo_matrix((m.data[kept], place), m.shape).tocsr() for m in self._sums]

    def _of(self, latent: int) -> tuple[NDArray, list[NDArray]]:
        """Tokens of a latent, and their sums of activation, its square, and firings."""
        if not 0 <= latent < self.n_latents:
            raise InputError(f"latents are numbered 0 to {self.n_latents - 1}, got {latent}.")
        self._merge()
        here = slice(*self._sums[0].indptr[latent : latent + 2])
        return self._sums[0].indices[here], [sums.data[here] for sums in self._sums]

    def top(self, latent: int, count: int) -> list[InputToken]:
        """The tokens that say most about a latent; empty if it never fired.

        Raises:
            InputError: if there is no such latent.
        """
        tokens, (mass, squares, firings) = self._of(latent)
        if not len(tokens):
            return []
        whole, whole_squares = (s.sum() + self._pooled[i, latent] for i, s in enumerate((mass, squares)))
        share = mass / whole
        base = self.text[tokens] / self.text.sum()
        best = np.argsort(-share * np.log(share / base), kind="stable")[:count]
        low, high = wilson_interval(share[best], whole**2 / whole_squares)
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
        """Firings of every latent."""
        self._merge()
        return np.asarray(self._sums[2].sum(axis=1)).ravel() + self._pooled[2]

    def _whole(self) -> NDArray:
        """Activation of every latent over all tokens."""
        self._merge()
        return np.asarray(self._sums[0].sum(axis=1)).ravel() + self._pooled[0]

    def entropies(self) -> Float[np.ndarray, " n_latents"]:
        """H(q) of every latent in nats; 0 where it never fired."""
        whole, mass, pooled = self._whole(), self._sums[0].copy(), self._pooled[0]
        mass.data *= np.log(mass.data)
        log_mass = np.asarray(mass.sum(axis=1)).ravel()
        with np.errstate(divide="ignore", invalid="ignore"):
            # What was pooled counts as spread evenly over the tokens that went into it, as many as they
            # can be: so entropy is rather over- than underestimated.
            others = np.minimum(self._pooled_pairs, self.vocabulary - np.diff(self._sums[0].indptr))
            log_mass += np.where(pooled > 0, pooled * np.log(pooled / others.clip(min=1)), 0.0)
            return np.where(whole > 0, np.log(whole) - log_mass / whole, 0.0).clip(min=0.0)

    def text_entropy(self) -> float:
        """H(p) in nats."""
        p = self.text[self.text > 0] / self.text.sum()
        return float(-(p * np.log(p)).sum())

    def latents_of(self, token: int) -> tuple[Int[np.ndarray, " found"], Float[np.ndarray, " found"]]:
        """The latents that fire on a token, by falling share x log lift, and these scores."""
        whole, column = self._whole(), self._sums[0].getcol(token).tocoo()
        share = column.data / whole[column.row]
        scores = share * np.log(share * self.text.sum() / max(1, self.text[token]))
        best = np.argsort(-scores, kind="stable")
        return column.row[best], scores[best]

    def tensors(self) -> dict[str, Tensor]:
        """Everything, to be saved; activations in float32."""
        self._merge()
        arrays = {
            "text": self.text,
            "indptr": self._sums[0].indptr.astype(np.int64),
            "indices": self._sums[0].indices.astype(np.int32),
            "sums": np.stack([sums.data for sums in self._sums]).astype(np.float32),
            "pooled": np.concatenate([self._pooled, self._pooled_pairs[None]]),
        }
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    @classmethod
    def from_tensors(cls, tensors: dict[str, Tensor]) -> TokenCounts:
        """What `tensors` gave."""
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        counts = cls(arrays["pooled"].shape[1], len(arrays["text"]))
        counts.text = arrays["text"]
        shape = (counts.n_latents, counts.vocabulary)
        counts._sums = [
            csr_matrix((data.astype(np.float64), arrays["indices"], arrays["indptr"]), shape)
            for data in arrays["sums"]
        ]
        counts._pooled, counts._pooled_pairs = arrays["pooled"][:3], arrays["pooled"][3]
        return counts


def wilson_interval(share: NDArray, n: float) -> tuple[NDArray, NDArray]:
    """Wilson's 95 % interval of a share seen in n (effective) trials."""
    centre = (share + _Z**2 / (2 * n)) / (1 + _Z**2 / n)
    half = _Z * np.sqrt(share * (1 - share) / n + _Z**2 / (4 * n**2)) / (1 + _Z**2 / n)
    return (centre - half).clip(min=0.0), (centre + half).clip(max=1.0)
