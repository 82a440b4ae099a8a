"""K-means: one centroid a row, by Lloyd's passes over streamed rows."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from sae.baselines.base import Baseline
from sae.baselines.rows import Worst, count_rows, first_rows, mini_batches, require_several_passes
from sae.errors import InputError
from sae.ops.bags import sum_rows
from sae.ops.group import ALONE, Group
from sae.ops.moments import Moments
from sae.ops.nonnegative import nonnegative_codes
from sae.ops.pursuit import nonnegative_pursuit
from sae.ops.sparse import SparseLatents, from_dense

# Rows the start is made from (n_latents if that is more), and rows of a mini-batch.
_START_ROWS, _ROWS = 10_000, 1024
# A squared distance below this share of |x - mean|² is float32 rounding, as is a centroid's own length
# below this share of the rows' deviation.
_ROUNDING = 1e-6


class KMeans(Baseline):
    """Every row is its nearest centroid: the sparsest code of all, one latent a row.

    `directions` are centroids - mean as unit rows, and `lengths` what they had: a row's latent is the length
    of its centroid, so x_hat = mean + latents @ directions is that centroid. A centroid on the mean has no
    direction; it gets the first axis, a length of zero, and no part in `sparse_code`.

    Lloyd's algorithm from greedy k-means++ on the first rows, one pass for each iteration; memory does not
    grow with the rows. A cluster that no row is in starts again at the row farthest from its centroid.

    References:
        "Least squares quantization in PCM", Lloyd, 1982. "k-means++: The Advantages of Careful Seeding",
        Arthur & Vassilvitskii, 2007 (the start; several candidates a step as they suggest).
    """

    components: Tensor
    lengths: Tensor

    def __init__(
        self, d_model: int, n_latents: int, passes: int = 50, tolerance: float = 1e-4, seed: int = 0
    ) -> None:
        """Makes an unfitted clustering.

        Args:
            d_model: Width of a row.
            n_latents: Clusters.
            passes: The most passes over the rows.
            tolerance: The fit ends when the squared movements of all centroids add up to at most this share
                of a coordinate's variance, as in scikit-learn.
            seed: Of the start.
        """
        super().__init__(d_model, n_latents)
        for name, value, least in (("passes", passes, 1), ("tolerance", tolerance, 0)):
            if value < least:
                raise InputError(f"`{name}` must be at least {least}, got {name}={value}.")
        self.passes, self.tolerance, self.seed = passes, tolerance, seed
        self.register_buffer("components", torch.zeros(n_latents, d_model))
        self.register_buffer("lengths", torch.zeros(n_latents))

    @property
    def inference(self) -> str:
        """The nearest centroid."""
        return (
            "i = argmax of (x - b_dec) @ (lengths * W_dec).T - lengths^2 / 2 (the nearest centroid); "
            "latents[i] = lengths[i], all others 0; x_hat = latents @ W_dec + b_dec"
        )

    @property
    def config(self) -> dict[str, Any]:
        """Constructor's arguments."""
        return {name: getattr(self, name) for name in ("d_model", "n_latents", "passes", "tolerance", "seed")}

    @property
    def directions(self) -> Float[Tensor, "n_latents d_model"]:
        """From the mean to every centroid, as unit rows."""
        self._require_fit()
        return self.components

    @property
    def centroids(self) -> Float[Tensor, "n_latents d_model"]:
        """The centroids themselves, in raw units."""
        return self.mean + self.lengths[:, None] * self.directions

    @torch.no_grad()
    def fit(self, batches: Iterable[Tensor], moments: Moments, group: Group = ALONE) -> KMeans:
        """Finds the centroids; warns where `passes` ends it early, or rows cannot fill all clusters."""
        self._start_fit(moments)
        require_several_passes(batches)
        n_rows = count_rows(batches)
        if n_rows < self.n_latents:
            raise InputError(
                f"`n_latents` must be at most the number of rows, {n_rows}, got n_latents={self.n_latents}; "
                "lower it or give more rows."
            )
        head = first_rows(batches, max(_START_ROWS, self.n_latents), self.mean).to(self.mean) - self.mean
        start = spread_start(head, self.n_latents, torch.Generator().manual_seed(self.seed))
        del head
        group.of_first_(start)
        found = _Pass(start, torch.inf, 0, 0)
        enough = self.tolerance * moments.total_variance / self.d_model
        for _ in range(self.passes):
            found = self._pass(batches, found.centroids, group)
            if not found.restarted and found.moved <= enough:
                break
        else:
            warnings.warn(
                f"KMeans stopped after passes={self.passes}: the last one moved centroids by "
                f"{found.moved:.2g} (sum of squares) and restarted {found.restarted}, tolerance allows "
                f"{enough:.2g}; raise `passes`.",
                stacklevel=3,  # past the wrapper of no_grad
            )
        if found.empty > found.restarted:
            warnings.warn(
                f"KMeans found no rows for {found.empty - found.restarted} of {self.n_latents} clusters: "
                "there are not so many different rows; lower `n_latents`.",
                stacklevel=3,
            )
        self._take(found.centroids, math.sqrt(moments.total_variance))
        self.fitted.fill_(True)
        return self

    def encode(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... n_latents"]:
        """The length of the nearest centroid in its place, zeros elsewhere."""
        nearest, _ = _assign(
            self._centred(x).reshape(-1, self.d_model), self.lengths[:, None] * self.components
        )
        one_hot = F.one_hot(nearest, self.n_latents).to(self.lengths.dtype)
        return (one_hot * self.lengths).reshape(*x.shape[:-1], self.n_latents)

    def encode_sparse(self, x: Float[Tensor, "... d_model"]) -> SparseLatents:
        """The same without a matrix of all latents; no entry for a centroid on the mean."""
        rows = self.rows_of(x)
        nearest, _ = _assign(self._centred(rows), self.lengths[:, None] * self.components)
        ends = torch.arange(len(rows) + 1, device=rows.device)
        return SparseLatents(self.lengths[nearest], nearest, ends).without_zeros()

    def sparse_code(self, x: Float[Tensor, "rows d_model"], k: int) -> SparseLatents:
        """Non-negative pursuit of x - mean on `directions`; with all of them, non-negative least squares."""
        centred, atoms = self._centred(x), self.directions * (self.lengths > 0)[:, None]
        if k >= self.n_latents:
            return from_dense(nonnegative_codes(atoms @ atoms.T, centred @ atoms.T))
        return nonnegative_pursuit(centred, atoms, k)

    def saved_tensors(self) -> dict[str, Tensor]:
        """Unit directions, the mean, and the lengths that make centroids of them."""
        return {"W_dec": self.directions.clone(), "b_dec": self.mean.clone(), "lengths": self.lengths.clone()}

    @torch.no_grad()
    def load_saved_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes what `saved_tensors` gave."""
        self._load(tensors, components="W_dec", mean="b_dec", lengths="lengths")

    def _pass(self, batches: Iterable[Tensor], centroids: Tensor, group: Group) -> _Pass:
        """One iteration; ranks share every mini-batch."""
        sums = torch.zeros_like(centroids, dtype=torch.float64)
        counts = sums.new_zeros(self.n_latents)
        worst = Worst(self.n_latents, self.mean)
        for mini_batch in mini_batches(batches, _ROWS, self.mean):
            rows = group.share(mini_batch).to(self.mean) - self.mean
            nearest, distances = _assign(rows, centroids)
            order = nearest.argsort(stable=True)
            sizes = torch.bincount(nearest, minlength=self.n_latents)
            offsets = F.pad(sizes.cumsum(0), (1, 0))
            sums += sum_rows(rows.new_ones(len(rows)), order, offsets, rows)
            counts += sizes
            worst.add(rows, distances)
        group.sum_(sums, counts)
        worst.join(group)
        empty = (counts == 0).nonzero().squeeze(1)
        restarted = empty[: len(worst.rows)]
        moved_to = torch.where(counts[:, None] > 0, (sums / counts[:, None]).to(centroids), centroids)
        moved_to[restarted] = worst.rows[: len(restarted)]
        moved = (moved_to - centroids).square().sum(dtype=torch.float64)
        group.of_first_(moved_to, moved)  # other machines may round otherwise
        return _Pass(moved_to, moved.item(), len(empty), len(restarted))

    def _take(self, centroids: Tensor, deviation: float) -> None:
        """Centroids about the mean become directions and lengths."""
        lengths = centroids.norm(dim=1)
        exists = lengths > _ROUNDING * deviation
        axis = F.one_hot(torch.zeros_like(exists, dtype=torch.int64), self.d_model).to(centroids)
        self.components.copy_(F.normalize(torch.where(exists[:, None], centroids, axis), dim=1))
        self.lengths.copy_(torch.where(exists, lengths, 0))


class _Pass(NamedTuple):
    """What an iteration gives: centroids, their squared movement, clusters without rows, those restarted."""

    centroids: Tensor
    moved: float
    empty: int
    restarted: int


def _assign(rows: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """The nearest centroid of every row and the squared distance to it, rounding taken for zero."""
    scores = torch.addmm(-centroids.square().sum(1) / 2, rows, centroids.T)
    best, nearest = scores.max(dim=1)
    energy = rows.square().sum(1)
    distances = energy - 2 * best
    return nearest, torch.where(distances > _ROUNDING * energy, distances, 0)


def spread_start(
    rows: Float[Tensor, "rows d_model"], n_latents: int, generator: torch.Generator
) -> Float[Tensor, "n_latents d_model"]:
    """Greedy k-means++: rows drawn by their squared distance to those chosen, the best of a few each time.

    Where fewer rows than that differ, the rest are drawn from all rows alike.
    """
    energy = rows.square().sum(1)
    chosen = torch.randint(len(rows), (n_latents,), generator=generator)
    closest = torch.full_like(energy, torch.inf)
    candidates, tries = chosen[:1], 2 + int(math.log(n_latents))
    for i in range(n_latents):
        picked = rows[candidates.to(rows.device)]
        distances = energy - 2 * picked @ rows.T + picked.square().sum(1, keepdim=True)
        distances = torch.where(distances > _ROUNDING * energy, distances, 0).minimum(closest)
        best = distances.sum(1).argmin()
        chosen[i], closest = candidates[int(best)], distances[best]
        reach = closest.double().cpu().cumsum(0)  # drawn on the CPU: the same on every device
        if not reach[-1] > 0:
            break
        drawn = torch.rand(tries, generator=generator, dtype=torch.float64) * reach[-1]
        candidates = torch.searchsorted(reach, drawn, right=True).clamp(max=len(rows) - 1)
    return rows[chosen.to(rows.device)]
