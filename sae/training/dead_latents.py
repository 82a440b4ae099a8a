"""Which latents have stopped firing, counted in tokens."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from sae.ops.sparse import SparseLatents


def count_firings(latents: SparseLatents, n_latents: int) -> Float[Tensor, " n_latents"]:
    """On how many rows each latent fired; entries equal to zero do not count."""
    firing = (latents.values.detach() > 0).float()
    return firing.new_zeros(n_latents).index_add_(0, latents.indices, firing)


class DeadLatents(nn.Module):
    """Counts tokens since each latent fired; a latent is dead after `dead_after_tokens` without.

    The list of dead latents is refreshed every `refresh_every` steps, because its length has to be
    known on the host: on a GPU that is the only wait of a quiet step. Both the counters and the list
    are buffers, so a resumed run continues with the same ones.
    """

    tokens_since_fired: Tensor
    dead: Tensor

    def __init__(self, n_latents: int, dead_after_tokens: int, refresh_every: int = 10) -> None:
        super().__init__()
        self.dead_after_tokens = dead_after_tokens
        self._refresh_every = refresh_every
        self._ids: Tensor | None = None
        self.register_buffer("tokens_since_fired", torch.zeros(n_latents, dtype=torch.int64))
        self.register_buffer("dead", torch.zeros(n_latents, dtype=torch.bool))

    @torch.no_grad()
    def update(self, fired: Bool[Tensor, " n_latents"], tokens: int | Int[Tensor, ""], step: int) -> None:
        """Counts step `step`: the tokens that all ranks saw in it, and which latents fired on any."""
        self.tokens_since_fired += tokens
        self.tokens_since_fired.masked_fill_(fired, 0)
        if (step + 1) % self._refresh_every == 0:
            self.dead.copy_(self.tokens_since_fired >= self.dead_after_tokens)
            self._ids = None

    def forgive(self, ids: Int[Tensor, " some"]) -> None:
        """Counts some latents as if they had just fired."""
        self.tokens_since_fired[ids] = 0
        self.dead[ids] = False
        self._ids = None

    @property
    def ids(self) -> Int[Tensor, " dead"]:
        """Latents that were dead at the last refresh."""
        if self._ids is None:
            self._ids = self.dead.nonzero().squeeze(1)
        return self._ids

    def fraction(self) -> Tensor:
        """Share of latents dead now, as a tensor (no wait)."""
        return (self.tokens_since_fired >= self.dead_after_tokens).float().mean()
