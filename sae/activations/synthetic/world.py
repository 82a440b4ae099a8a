"""A world with trees, correlations and noise, of which any row can be had again at any time."""

from __future__ import annotations

import math
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.nn import functional as F

from sae.activations.synthetic.config import WorldConfig
from sae.activations.synthetic.planted import PlantedRows
from sae.activations.synthetic.rates import firing_rates, plant_forest
from sae.errors import InputError
from sae.ops.geometry import spread_directions
from sae.ops.moments import Moments, StreamingMoments
from sae.ops.sparse import SparseLatents, sparse_decode

BLOCK = 1024
"""Rows that are drawn together. Part of what rows are: another number makes other rows."""
MOMENTS_STREAM = 1
"""The stream of rows that moments are estimated from; 0 is that of caches and held-out rows."""
_MOMENTS_ROWS = 65_536
_PARTS, _ROWS = 0, 1  # what a generator is for


class World:
    """Sparse features in superposition, and an endless sequence of rows made of them.

    x = bias + sum over the features f that fire of magnitude_f * directions[f] + noise.

    - Roots of trees and features outside them fire by a Gaussian copula: a feature fires where its Gaussian
      is in the top share `rates[f]`. The Gaussians share `correlation_rank` factors.
    - A child fires only where its parent does, and no two children of a parent fire together: one further
      Gaussian for each parent that fires picks the child, or none. These share factors of their own, one
      set per level, so that correlations change no rate: `rates` are exact.
    - Magnitudes are |N(mean, spread)|. A child's is multiplied by its parent's over the parent's mean
      magnitude, and so on down the tree; the means stay `mean_magnitudes`.

    Rows i of a stream are a pure function of the configuration, the stream, i and the kind of device (CPU
    and GPU draw different numbers), whoever asks for them in whatever portions.

    References:
        SynthSAEBench: Evaluating Sparse Autoencoders on Scalable Realistic Synthetic Data, Chanin and
        Garriga-Alonso 2026, arXiv 2602.14687 (the ingredients). There correlations and trees act on all
        features at once, which moves the rates; here they are exact.
    """

    def __init__(
        self, config: WorldConfig, directions: Float[Tensor, "n_features d_model"] | None = None
    ) -> None:
        """Makes the world.

        Args:
            config: what it is made of.
            directions: as an earlier world of this configuration had them; None = made from the seed.

        Raises:
            InputError: if the configuration is impossible.
        """
        config.check()
        self.config = config
        self.forest = plant_forest(config)
        self.parents = self.forest.parents
        self.rates = firing_rates(config, self.forest)
        generator = _generator(torch.device("cpu"), config.seed, _PARTS)
        self._draw_parts(generator)
        self.directions = self._make_directions(generator) if directions is None else directions
        self._on: dict[torch.device, _Parts] = {}
        self._last: tuple[object, PlantedRows] | None = None

    def _draw_parts(self, generator: torch.Generator) -> None:
        config, n = self.config, self.config.n_features
        loadings = torch.randn(n, config.correlation_rank, generator=generator) * config.correlation_scale
        size = loadings.norm(dim=1, keepdim=True)
        self._loadings = loadings * (0.95 / size.clamp_min(1e-12)).clamp_max(1.0)
        means = torch.linspace(config.magnitude_max, config.magnitude_min, n)
        std = config.magnitude_std
        spreads = (std + std * torch.randn(n, generator=generator)).abs()
        self._magnitudes = means, spreads
        self.bias = config.bias * F.normalize(torch.randn(config.d_model, generator=generator), dim=0)

    def _make_directions(self, generator: torch.Generator) -> Tensor:
        config = self.config
        if config.max_cosine is None:
            return F.normalize(torch.randn(config.n_features, config.d_model, generator=generator), dim=-1)
        try:
            return spread_directions(config.n_features, config.d_model, config.max_cosine, generator)
        except ValueError as error:
            raise InputError(str(error)) from error

    @property
    def mean_l0(self) -> float:
        """Features that fire per row, on average."""
        return float(self.rates.sum())

    @cached_property
    def mean_magnitudes(self) -> Float64[Tensor, " n_features"]:
        """Mean magnitude of each feature over the rows on which it fires."""
        mean, spread = (part.double() for part in self._magnitudes)
        spread = spread.clamp_min(1e-12)
        folded = spread * math.sqrt(2 / math.pi) * (-(mean**2) / (2 * spread**2)).exp()
        return folded + mean * torch.erf(mean / (spread * math.sqrt(2)))

    @cached_property
    def mean(self) -> Float64[Tensor, " d_model"]:
        """The mean row, exactly."""
        return self.bias.double() + (self.rates * self.mean_magnitudes) @ self.directions.double()

    def moments(self, n_rows: int = _MOMENTS_ROWS, device: torch.device | str = "cpu") -> Moments:
        """Mean and second moment, estimated from rows of a stream that nothing else uses.

        Relative error of a variance: about sqrt(2 / n_rows).
        """
        found = StreamingMoments()
        for begin in range(0, n_rows, BLOCK):
            found.add(self.rows(begin, min(begin + BLOCK, n_rows), device, MOMENTS_STREAM).x)
        return found.moments()

    def sample(self, n_rows: int, index: int = 0, device: torch.device | str = "cpu") -> PlantedRows:
        """Rows index * n_rows up to (index + 1) * n_rows of stream 0, with their true code."""
        return self.rows(index * n_rows, (index + 1) * n_rows, device)

    def rows(self, begin: int, end: int, device: torch.device | str = "cpu", stream: int = 0) -> PlantedRows:
        """Rows begin to end of a stream, with their true code (entries of a row by feature).

        Blocks of `BLOCK` rows are drawn whole and the last one is kept, so that small portions in order
        cost no more than large ones.

        Raises:
            InputError: if there is no such stretch.
        """
        if not 0 <= begin < end:
            raise InputError(f"`begin` and `end` must satisfy 0 <= begin < end, got {begin} and {end}.")
        device = torch.empty(0, device=device).device  # cuda -> cuda:0
        parts = []
        for block in range(begin // BLOCK, -(-end // BLOCK)):
            at = block * BLOCK
            parts.append(_slice(self._block(device, stream, block), max(begin - at, 0), min(end - at, BLOCK)))
        return parts[0] if len(parts) == 1 else _join(parts)

    def _block(self, device: torch.device, stream: int, block: int) -> PlantedRows:
        key = (device, stream, block)
        last = self._last
        if last is None or last[0] != key:
            last = self._last = key, self._draw(device, stream, block)
        return last[1]

    @torch.no_grad()
    def _draw(self, device: torch.device, stream: int, block: int) -> PlantedRows:
        if device not in self._on:
            self._on[device] = _Parts(self, device)
        parts = self._on[device]
        generator = _generator(device, self.config.seed, _ROWS, stream, block)
        code = parts.draw_code(generator)
        x = sparse_decode(code, parts.directions) + parts.bias
        if self.config.noise:
            x += self.config.noise * torch.randn(x.shape, generator=generator, device=device)
        return PlantedRows(x, code)


class _Parts:
    """What drawing needs of a world, on one device."""

    def __init__(self, world: World, device: torch.device) -> None:
        self._device, self._n = device, world.config.n_features
        self.directions, self.bias = world.directions.to(device), world.bias.to(device)
        self._mean, self._spread = (part.to(device) for part in world._magnitudes)
        self._usual = world.mean_magnitudes.float().to(device)
        self._loadings = world._loadings.to(device)
        self._rest = (1 - self._loadings.square().sum(1)).sqrt()
        free = (world.parents < 0).nonzero().squeeze(1)
        self._free = free.to(device)
        self._threshold = torch.special.ndtri(1 - world.rates[free]).float().to(device)
        self._levels = world.forest.levels
        self._branching = world.config.branching
        self._until = [self._cumulative(world, *level).to(device) for level in self._levels[1:]]

    def _cumulative(self, world: World, begin: int, end: int) -> Tensor:
        """Of each parent, the cumulative chances of its children given that it fires."""
        chances = world.rates[begin:end] / world.rates[world.parents[begin:end]]
        return chances.view(-1, self._branching).cumsum(1).float()

    def draw_code(self, generator: torch.Generator) -> SparseLatents:
        factors = self._normal(generator, BLOCK, self._loadings.shape[1])
        score = factors @ self._loadings[self._free].T
        score += self._rest[self._free] * self._normal(generator, BLOCK, len(self._free))
        rows, places = (score > self._threshold).nonzero(as_tuple=True)
        features = self._free[places]
        magnitudes = self._magnitude(generator, features)
        found = [(rows, features, magnitudes)]
        for (begin, end), (first_child, _), until in zip(
            self._levels, self._levels[1:], self._until, strict=False
        ):
            here = (features >= begin) & (features < end)
            rows, parents, strength = rows[here], features[here], magnitudes[here]
            factors = self._normal(generator, BLOCK, self._loadings.shape[1])
            score = (factors[rows] * self._loadings[parents]).sum(1)
            score += self._rest[parents] * self._normal(generator, len(parents))
            slot = (torch.special.ndtr(score)[:, None] >= until[parents - begin]).sum(1)
            chosen = slot < self._branching
            rows, parents, strength, slot = rows[chosen], parents[chosen], strength[chosen], slot[chosen]
            features = first_child + (parents - begin) * self._branching + slot
            magnitudes = self._magnitude(generator, features) * strength / self._usual[parents]
            found.append((rows, features, magnitudes))
        return self._gather(*(torch.cat(part) for part in zip(*found, strict=True)))

    def _gather(self, rows: Tensor, features: Tensor, magnitudes: Tensor) -> SparseLatents:
        order = (rows * self._n + features).argsort()
        counts = torch.bincount(rows, minlength=BLOCK)
        return SparseLatents(magnitudes[order], features[order], F.pad(counts.cumsum(0), (1, 0)))

    def _magnitude(self, generator: torch.Generator, features: Tensor) -> Tensor:
        return (self._mean[features] + self._spread[features] * self._normal(generator, len(features))).abs()

    def _normal(self, generator: torch.Generator, *shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=self._device)


def _generator(device: torch.device, *key: int) -> torch.Generator:
    """Seeded by all of the key."""
    seed = int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0])
    return torch.Generator(device).manual_seed(seed >> 1)


def _slice(rows: PlantedRows, begin: int, end: int) -> PlantedRows:
    if (begin, end) == (0, BLOCK):
        return rows
    offsets = rows.latents.row_offsets[begin : end + 1]
    first, last = int(offsets[0]), int(offsets[-1])
    code = SparseLatents(
        rows.latents.values[first:last], rows.latents.indices[first:last], offsets - offsets[0]
    )
    return PlantedRows(rows.x[begin:end], code)


def _join(parts: list[PlantedRows]) -> PlantedRows:
    counts = torch.cat([part.latents.row_offsets.diff() for part in parts])
    code = SparseLatents(
        torch.cat([part.latents.values for part in parts]),
        torch.cat([part.latents.indices for part in parts]),
        F.pad(counts.cumsum(0), (1, 0)),
    )
    return PlantedRows(torch.cat([part.x for part in parts]), code)
