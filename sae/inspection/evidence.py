"""Evidence for every latent, gathered in one pass over a cache in bounded memory, saved and loaded."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors_bytes
from torch import Tensor
from tqdm import tqdm

from sae.activations.cache import ActivationCache
from sae.activations.contexts import Contexts, token_ids_of, whole_contexts
from sae.dictionaries import Dictionary
from sae.errors import InputError
from sae.files import write_atomically
from sae.inspection.contexts import ContextKeeper
from sae.inspection.input_tokens import TokenCounts
from sae.inspection.null import RandomDetectors, null_scores
from sae.ops.sparse import SparseLatents

FORMAT = "sae-evidence/2"
BINS_PER_OCTAVE = 4
OCTAVES = 20
"""Span of the activation histogram; activations beyond it are counted in its end bins."""
WINDOW = 48
TOP = 12
SAMPLED = 12
MOST_TOKENS = 25_000_000
"""Rows that evidence is gathered from unless told otherwise, at most."""
_NULL_SAMPLE = 65_536  # rows that the random directions' thresholds are set on


@dataclass
class Evidence:
    """What one pass saw of every latent."""

    rows: int
    """Rows seen: the tokens that the cache has activations of. What follows is of these only."""
    lowest: float
    """Left edge of the histograms, raw units; bin i begins at lowest * 2^(i / BINS_PER_OCTAVE)."""
    firings: Int[Tensor, " n_latents"]
    mass: Float[Tensor, " n_latents"]
    """Sum of activations."""
    largest: Float[Tensor, " n_latents"]
    histogram: Int[Tensor, "n_latents bins"]
    inputs: TokenCounts
    """By the token that the latent fires at."""
    previous: TokenCounts
    """By the token before it."""
    null: Float[Tensor, "detectors scores"]
    """The same scores of random directions, see `sae.inspection.null`."""
    top: dict[str, Tensor]
    """The strongest firing in each of a latent's best sequences: value, sequence, begin, peak, trace."""
    sampled: dict[str, Tensor]
    """A uniform sample of all firings, the same fields."""

    def save(self, path: Path, about: dict[str, Any]) -> None:
        """Writes one safetensors file atomically; `about` says what it was gathered from."""
        tensors = {name: getattr(self, name) for name in ("firings", "mass", "largest", "histogram", "null")}
        for group in ("inputs", "previous"):
            tensors |= {f"{group}.{name}": t for name, t in getattr(self, group).tensors().items()}
        for group in ("top", "sampled"):
            tensors |= {f"{group}.{name}": t for name, t in getattr(self, group).items()}
        header = {
            "format": FORMAT,
            "rows": str(self.rows),
            "lowest": repr(self.lowest),
            "about": json.dumps(about, sort_keys=True),
        }
        data = to_safetensors_bytes({n: t.cpu().contiguous() for n, t in tensors.items()}, metadata=header)
        write_atomically(path, data)

    @classmethod
    def load(cls, path: Path, about: dict[str, Any]) -> Evidence | None:
        """What `save` wrote; None if the file is missing, damaged, or gathered from something else."""
        try:
            with safe_open(path, framework="pt") as file:
                header = file.metadata() or {}
                if header.get("format") != FORMAT or json.loads(header["about"]) != about:
                    return None
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return cls._from_file(header, tensors)
        except (OSError, SafetensorError, KeyError, ValueError):
            return None

    @classmethod
    def _from_file(cls, header: dict[str, str], tensors: dict[str, Tensor]) -> Evidence:
        def group(prefix: str) -> dict[str, Tensor]:
            return {n.partition(".")[2]: t for n, t in tensors.items() if n.startswith(f"{prefix}.")}

        return cls(
            rows=int(header["rows"]),
            lowest=float(header["lowest"]),
            firings=tensors["firings"],
            mass=tensors["mass"],
            largest=tensors["largest"],
            histogram=tensors["histogram"],
            inputs=TokenCounts.from_tensors(group("inputs")),
            previous=TokenCounts.from_tensors(group("previous")),
            null=tensors["null"],
            top=group("top"),
            sampled=group("sampled"),
        )


@torch.inference_mode()
def gather_evidence(
    dictionary: Dictionary, cache: ActivationCache, hookpoint: str, max_tokens: int = MOST_TOKENS
) -> Evidence:
    """Encodes train rows once, context by context, and keeps what shows each latent.

    Exact over the rows seen: counts, sums, the strongest contexts. Memory does not grow with the rows:
    a histogram, 24 windows of 48 tokens and the token counts of each latent (see `TokenCounts`).

    Args:
        dictionary: with latents that are never negative.
        cache: with token ids.
        hookpoint: which of its rows.
        max_tokens: rows read at most, whole contexts, the first ones of `whole_contexts`: a fair sample.

    Raises:
        InputError: if the dictionary does not have the width of the rows or has negative latents, or
            the cache knows no tokens.
    """
    if dictionary.d_model != cache.d_model(hookpoint):
        raise InputError(
            f"the dictionary has d_model={dictionary.d_model}, the cache {cache.location} has"
            f" {cache.d_model(hookpoint)} at {hookpoint}; they are not of one run."
        )
    token_ids = token_ids_of(cache)
    context = token_ids.shape[1]
    total = min(cache.n_rows("train"), max(context, max_tokens // context * context))
    batches = _up_to(total, whole_contexts(cache, "train", hookpoint))
    first: list[Contexts] = []
    seen = 0
    for batch in batches:
        first.append(batch)
        seen += int(batch.cached.sum())
        if seen >= _NULL_SAMPLE:
            break
    sample = torch.cat([_rows(dictionary, batch) for batch in first])
    gathering = _Gathering(dictionary, sample, total, context, vocabulary=int(token_ids.max()) + 1)
    with tqdm(total=total, desc="evidence", unit=" tokens", unit_scale=True, leave=False) as bar:
        for batch in chain(first, batches):
            x = _rows(dictionary, batch)
            gathering.add(x, batch)
            bar.update(len(x))
    return gathering.evidence()


def _up_to(rows: int, batches: Iterator[Contexts]) -> Iterator[Contexts]:
    """The first contexts that have no more rows than these together."""
    left = rows
    for batch in batches:
        together = batch.cached.sum(1).cumsum(0)
        fit = int((together <= left).sum())
        if fit:
            yield Contexts(*(part[:fit] for part in batch))
            left -= int(together[fit - 1])
        if fit < len(together) or left <= 0:
            return


def _rows(dictionary: Dictionary, batch: Contexts) -> Tensor:
    """Its cached rows. The zeros in place of the others are no activations: latents would fire by bias."""
    own = dictionary.directions
    return batch.x[batch.cached].to(own.device, own.dtype)


class _Gathering:
    """A pass under way."""

    def __init__(
        self, dictionary: Dictionary, sample: Tensor, rows: int, context: int, vocabulary: int
    ) -> None:
        n, device = dictionary.n_latents, sample.device
        self._dictionary = dictionary
        self._null = RandomDetectors(sample, rows)
        self._rows = 0
        self._firings = torch.zeros(n, dtype=torch.int64, device=device)
        self._mass = torch.zeros(n, dtype=torch.float64, device=device)
        self._largest = torch.zeros(n, dtype=torch.float64, device=device)
        self._histogram = torch.zeros(n, OCTAVES * BINS_PER_OCTAVE, dtype=torch.int64, device=device)
        # The span reaches four octaves above anything in the sample.
        values = dictionary.encode_sparse(sample[:4096]).values
        top = float(values.max()) if len(values) else 1.0
        self._lowest = 2.0 ** (4 - OCTAVES) * max(top, 1e-30)
        self._contexts = ContextKeeper(n, context, WINDOW, TOP, SAMPLED, device)
        self._counts = [TokenCounts(size, vocabulary) for size in (n, n, *2 * [self._null.n_latents])]

    def add(self, x: Tensor, batch: Contexts) -> None:
        code = self._dictionary.encode_sparse(x)
        if len(code.values) and float(code.values.min()) < 0:
            raise InputError(
                f"{type(self._dictionary).__name__} has negative latents; evidence is read for latents that"
                " are never negative."
            )
        self._rows += len(x)
        n, bins = self._histogram.shape
        self._firings += torch.bincount(code.indices, minlength=n)
        self._mass += torch.bincount(code.indices, weights=code.values.double(), minlength=n)
        self._largest.scatter_reduce_(0, code.indices, code.values.double(), "amax")
        octaves = (code.values.double() / self._lowest).log2() * BINS_PER_OCTAVE
        place = code.indices * bins + octaves.floor().long().clamp(0, bins - 1)
        self._histogram += torch.bincount(place, minlength=n * bins).reshape(n, bins)
        present = batch.cached.flatten().to(x.device)
        self._contexts.add(batch.sequence, code.spread(present))
        self._count(code, batch, *self._counts[:2])
        self._count(self._null.encode_sparse(x), batch, *self._counts[2:])

    @staticmethod
    def _count(code: SparseLatents, batch: Contexts, inputs: TokenCounts, previous: TokenCounts) -> None:
        rows, latents, values = (t.cpu() for t in (code.rows, code.indices, code.values))
        text = batch.token_ids[batch.cached]
        inputs.add(text, latents, text[rows], values)
        # The token before a row is text, whether or not it has a row itself.
        before = batch.token_ids.roll(1, dims=1)[batch.cached]
        has_before = batch.cached.nonzero()[:, 1] > 0
        later = has_before[rows]
        previous.add(before[has_before], latents[later], before[rows[later]], values[later])

    def evidence(self) -> Evidence:
        inputs, previous, *of_null = self._counts
        contexts = self._contexts
        return Evidence(
            self._rows,
            self._lowest,
            self._firings.cpu(),
            self._mass.cpu(),
            self._largest.cpu(),
            self._histogram.cpu(),
            inputs,
            previous,
            null_scores(*of_null),
            *({name: t.cpu() for name, t in best.kept.items()} for best in (contexts.top, contexts.sampled)),
        )
