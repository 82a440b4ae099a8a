"""The contexts that show a latent: a heap per latent of its strongest firings, and a fair sample of all."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.ops.sparse import SparseLatents

Payload = Callable[[Int[Tensor, " chosen"]], dict[str, Tensor]]
"""Given which candidates are to be kept, what to keep of them, each with a first axis over candidates."""


_PLACES = ("sequence", "begin", "peak")  # where a window lies, and the firing in it


class BestPerLatent:
    """The `count` candidates of highest priority of each latent, exact over all that were offered.

    A heap for every latent at once, as sorted matrices: candidates below a latent's worst kept one are
    dropped first, which soon is nearly all of them. Ties go to the one offered first.
    """

    def __init__(self, n_latents: int, count: int, like: dict[str, Tensor]) -> None:
        """Starts empty.

        Args:
            n_latents: number of latents.
            count: candidates kept of each.
            like: what payloads look like: dtype, device, and shape after the first axis.
        """
        device = next(iter(like.values())).device
        self.priority = torch.full((n_latents, count), -torch.inf, dtype=torch.float64, device=device)
        self.kept = {name: t.new_zeros(n_latents, count, *t.shape[1:]) for name, t in like.items()}

    def offer(
        self,
        latents: Int[Tensor, " candidates"],
        priorities: Float[Tensor, " candidates"],
        payload: Payload,
    ) -> None:
        """Takes those candidates that are among their latent's best."""
        count = self.priority.shape[1]
        priorities = priorities.double()
        chosen = (priorities > self.priority[latents, -1]).nonzero().squeeze(1)
        chosen = chosen[priorities[chosen].argsort(descending=True, stable=True)]
        chosen = chosen[latents[chosen].argsort(stable=True)]
        touched, sizes = latents[chosen].unique_consecutive(return_counts=True)
        if not len(touched):
            return
        rank = torch.arange(len(chosen), device=chosen.device)
        rank -= (sizes.cumsum(0) - sizes).repeat_interleave(sizes)
        group = torch.arange(len(touched), device=chosen.device).repeat_interleave(sizes)
        chosen, group, rank = (t[rank < count] for t in (chosen, group, rank))

        offered = self.priority.new_full((len(touched), count), -torch.inf)
        offered[group, rank] = priorities[chosen]
        merged = torch.cat([self.priority[touched], offered], dim=1)
        places = merged.argsort(dim=1, descending=True, stable=True)[:, :count]
        self.priority[touched] = merged.gather(1, places)
        for name, new in payload(chosen).items():
            old = self.kept[name]
            beside = old.new_zeros(len(touched), count, *new.shape[1:])
            beside[group, rank] = new
            both = torch.cat([old[touched], beside], dim=1)
            old[touched] = both[torch.arange(len(touched), device=places.device)[:, None], places]


class ContextKeeper:
    """Of every latent: its strongest firing in each of the sequences where it fires most strongly, and a
    uniform random sample of all its firings; each with the activations of the tokens around it.

    The sample is by the smallest of a hash of (latent, sequence, position): the same whatever the order
    or the size of batches.
    """

    def __init__(
        self, n_latents: int, context: int, window: int, top: int, sampled: int, device: torch.device
    ) -> None:
        """Starts empty.

        Args:
            n_latents: number of latents.
            context: tokens of a sequence.
            window: tokens kept around a firing (two thirds of them before it, where there are so many).
            top: sequences kept of each latent.
            sampled: firings sampled of each latent.
            device: where codes will lie.
        """
        self._n_latents, self._context, self._window = n_latents, context, min(window, context)
        like = {
            "value": torch.empty(0, device=device),
            **{name: torch.empty(0, dtype=torch.int32, device=device) for name in _PLACES},
            "trace": torch.empty(0, self._window, dtype=torch.bfloat16, device=device),
        }
        self.top = BestPerLatent(n_latents, top, like)
        self.sampled = BestPerLatent(n_latents, sampled, like)

    def add(self, sequence: Int[Tensor, " sequences"], code: SparseLatents) -> None:
        """Adds whole sequences: the code has a row per token, sequence after sequence."""
        within, position = code.rows // self._context, code.rows % self._context
        key = code.indices * len(sequence) + within
        by_pair = key.argsort(stable=True)  # (latent, sequence), positions rising in each
        key, position, values = key[by_pair], position[by_pair], code.values[by_pair]
        sequence = sequence.to(key.device)
        latents, of_sequence = key // len(sequence), sequence[key % len(sequence)]

        def payload(chosen: Tensor) -> dict[str, Tensor]:
            begin = self._begin(position[chosen])
            return {
                "value": values[chosen].float(),
                "sequence": of_sequence[chosen].int(),
                "begin": begin.int(),
                "peak": (position[chosen] - begin).int(),
                "trace": self._trace(key, position, values, key[chosen], begin),
            }

        first = torch.ones_like(key, dtype=torch.bool)
        first[1:] = key[1:] != key[:-1]
        pair = first.cumsum(0) - 1
        n_pairs = int(pair[-1]) + 1 if len(pair) else 0
        largest = values.new_zeros(n_pairs).scatter_reduce_(0, pair, values, "amax", include_self=False)
        strongest = (values == largest[pair]).nonzero().squeeze(1)
        one_each = torch.ones_like(strongest, dtype=torch.bool)
        one_each[1:] = pair[strongest[1:]] != pair[strongest[:-1]]
        strongest = strongest[one_each]
        self.top.offer(latents[strongest], values[strongest], lambda chosen: payload(strongest[chosen]))
        self.sampled.offer(latents, _uniform_hash(latents, of_sequence, position), payload)

    def _begin(self, position: Tensor) -> Tensor:
        before = self._window * 2 // 3
        return (position - before).clamp(min=0).clamp(max=self._context - self._window)

    def _trace(self, key: Tensor, position: Tensor, values: Tensor, of: Tensor, begin: Tensor) -> Tensor:
        """Activations of each chosen pair's latent on its window, (chosen, window), bfloat16."""
        low, high = (torch.searchsorted(key, of, right=right) for right in (False, True))
        lengths = high - low
        row = torch.arange(len(of), device=of.device).repeat_interleave(lengths)
        entry = torch.arange(len(row), device=of.device) - (lengths.cumsum(0) - lengths - low)[row]
        place = position[entry] - begin[row]
        seen = (place >= 0) & (place < self._window)
        trace = torch.zeros(len(of), self._window, dtype=torch.float32, device=of.device)
        trace[row[seen], place[seen]] = values[entry[seen]].float()
        return trace.bfloat16()


def _uniform_hash(*numbers: Int[Tensor, " n"]) -> Float[Tensor, " n"]:
    """A fixed pseudo-random number in [0, 1) for each tuple of integers (splitmix64's finaliser)."""
    state = torch.zeros_like(numbers[0])
    for number in numbers:
        state = state + number.long() + _signed(0x9E3779B97F4A7C15)
        state = (state ^ _shift(state, 30)) * _signed(0xBF58476D1CE4E5B9)
        state = (state ^ _shift(state, 27)) * _signed(0x94D049BB133111EB)
        state = state ^ _shift(state, 31)
    return _shift(state, 11).double() / 2**53


def _shift(state: Tensor, bits: int) -> Tensor:
    """A logical right shift of 64-bit integers, which torch has only as arithmetic."""
    return (state >> bits) & ((1 << (64 - bits)) - 1)


def _signed(unsigned: int) -> int:
    return unsigned - 2**64 if unsigned >= 2**63 else unsigned
