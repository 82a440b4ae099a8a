"""Non-negative matrix factorisation of signed rows, learned from mini-batches."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from sae.baselines.base import Baseline
from sae.errors import InputError
from sae.ops.group import ALONE, Group
from sae.ops.moments import Moments
from sae.ops.nonnegative import nonnegative_codes
from sae.ops.pursuit import nonnegative_pursuit
from sae.ops.sparse import SparseLatents, from_dense

# Rows the start is made from, and rows in a mini-batch: about 64 updates a pass where the data allows.
_START_ROWS = 10_000
_MIN_ROWS, _MAX_ROWS = 512, 1024
# The statistics remember 1/20 of the rows seen, at most one pass: short while components move, long in
# the end, to average noise away. A fit ends no sooner than they cover one pass or 32,768 rows.
_MEMORY_SHARE, _LONG_MEMORY = 20, 32_768
# Steps of the two least-squares problems of an update: far from exact, and cheaper for the same objective.
_CODE_STEPS, _COMPONENT_STEPS = 10, 10
# An objective below this is float32 rounding.
_ROUNDING = 1e-6
# A component whose halves cancel to less than this share of it has no direction in signed space.
_NO_DIRECTION = 1e-6


class NMF(Baseline):
    """Parts that only add up: [relu(x - mean), relu(mean - x)] ≈ z @ components, all entries >= 0.

    Every row is centred and split into its positive and its negative part, (rows, 2 d_model). In
    signed space component j stands for H⁺[j] - H⁻[j], its two halves; `directions` holds these as unit
    rows, and latents are z times their lengths, so that x_hat = mean + latents @ directions.

    A mini-batch gets its codes by non-negative least squares and adds ZᵀZ and ZᵀX to statistics that
    slowly forget; the components then take a few projected gradient steps on them. Memory does not
    grow with the rows, and the result does not depend on how `batches` cuts them.

    References:
        "Learning the parts of objects by non-negative matrix factorization", Lee & Seung, 1999.
        "Online Learning for Matrix Factorization and Sparse Coding", Mairal, Bach, Ponce & Sapiro, 2010,
        arXiv:0908.0050. "Online algorithms for nonnegative matrix factorization with the
        Itakura-Saito divergence", Lefèvre, Bach & Févotte, 2011, arXiv:1106.4198 (forgetting).
        "SVD based initialization: A head start for nonnegative matrix factorization", Boutsidis &
        Gallopoulos, 2008 (the start; we fill its zeros with random values around the mean).
    """

    components: Tensor

    def __init__(
        self, d_model: int, n_latents: int, passes: int = 200, tolerance: float = 3e-4, seed: int = 0
    ) -> None:
        """Makes an unfitted factorisation.

        Args:
            d_model: Width of a row.
            n_latents: Components.
            passes: The most passes over the rows.
            tolerance: Relative fall of the objective over one pass at which the fit ends.
            seed: Of the random part of the start.
        """
        super().__init__(d_model, n_latents)
        for name, value, least in (("passes", passes, 1), ("tolerance", tolerance, 0)):
            if value < least:
                raise InputError(f"`{name}` must be at least {least}, got {name}={value}.")
        self.passes, self.tolerance, self.seed = passes, tolerance, seed
        self.register_buffer("components", torch.zeros(n_latents, 2 * d_model))

    @property
    def inference(self) -> str:
        """The non-negative least-squares code, on the saved tensors."""
        return (
            "s = [relu(x - b_dec), relu(b_dec - x)]; z = argmin over z >= 0 of |s - z @ components|^2; "
            "latents = z * |components[:, :d_model] - components[:, d_model:]| (row norms, those below "
            f"{_NO_DIRECTION:g} count as 0); x_hat = latents @ W_dec + b_dec"
        )

    @property
    def config(self) -> dict[str, Any]:
        """Constructor's arguments."""
        return {name: getattr(self, name) for name in ("d_model", "n_latents", "passes", "tolerance", "seed")}

    @property
    def directions(self) -> Float[Tensor, "n_latents d_model"]:
        """H⁺[j] - H⁻[j] as unit rows; where the halves cancel, H⁺[j], whose latent is always zero."""
        self._require_fit()
        return self._signed()[0]

    @torch.no_grad()
    def fit(self, batches: Iterable[Tensor], moments: Moments, group: Group = ALONE) -> NMF:
        """Learns the components; warns where `passes` ends it before `tolerance` does.

        Rows should come well mixed, as a cache gives them: of rows sorted by kind the first are forgotten.
        Ranks share the codes of every mini-batch and add up its statistics.
        """
        self._start_fit(moments)
        if iter(batches) is batches:
            raise InputError("`batches` must be re-iterable, got an iterator; give a list or a loader.")
        head = next(self._split_rows(batches, _START_ROWS), None)
        if head is None:
            raise InputError("`batches` must give at least one row, got none.")
        start = _start(head, self.n_latents, torch.Generator().manual_seed(self.seed))
        group.of_first_(start)  # other machines may round otherwise
        learner = _Learner(start, group)
        n_rows = sum(len(rows) for rows in batches)  # the moments may be of more
        size = min(max(n_rows // 64, _MIN_ROWS), _MAX_ROWS)
        before, fall = torch.inf, 1.0
        for _ in range(self.passes):
            now = learner.learn(self._split_rows(batches, size), n_rows)
            fall, before = 1 - now / before, now
            settled = learner.memory >= min(n_rows, _LONG_MEMORY)
            if now < _ROUNDING or (settled and fall < self.tolerance):
                break
        else:
            warnings.warn(
                f"NMF stopped after passes={self.passes}: the last one lowered the objective by {fall:.2g} "
                f"of itself, tolerance={self.tolerance:g}; raise `passes`.",
                stacklevel=3,  # past the wrapper of no_grad
            )
        self.components.copy_(F.normalize(learner.components, dim=1))
        group.of_first_(self.components)
        self.fitted.fill_(True)
        return self

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... n_latents"]:
        """The non-negative least-squares code of the split row, times the length of each signed component."""
        halves = _split(self._centred(x).reshape(-1, self.d_model))
        return (self._codes(halves) * self._signed()[1]).reshape(*x.shape[:-1], self.n_latents)

    def sparse_code(self, x: Float[Tensor, "rows d_model"], k: int) -> SparseLatents:
        """Non-negative pursuit of x - mean on `directions`, coefficients refitted by least squares.

        Where k allows all atoms there is nothing to pursue: the plain least-squares codes.
        """
        centred, atoms = self._centred(x), self.directions
        if k >= self.n_latents:
            return from_dense(nonnegative_codes(atoms @ atoms.T, centred @ atoms.T))
        return nonnegative_pursuit(centred, atoms, k)

    @torch.no_grad()
    def objective(self, batches: Iterable[Tensor]) -> float:
        """|X - Z components|² / |X|² over all rows, X split; |X|² is also that of the centred rows."""
        self._require_fit()
        error = total = 0.0
        for halves in self._split_rows(batches, _MAX_ROWS):
            left = halves - self._codes(halves) @ self.components
            error += left.double().square().sum().item()
            total += halves.double().square().sum().item()
        return error / total

    def saved_tensors(self) -> dict[str, Tensor]:
        """Unit directions and mean to decode with, `components` to encode with; the rule is `inference`."""
        return {"W_dec": self.directions, "b_dec": self.mean.clone(), "components": self.components.clone()}

    @torch.no_grad()
    def load_saved_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes components and b_dec; W_dec follows from the components."""
        self._load(tensors, components="components", mean="b_dec")

    def _codes(self, halves: Tensor) -> Tensor:
        return nonnegative_codes(self.components @ self.components.T, halves @ self.components.T)

    def _signed(self) -> tuple[Tensor, Tensor]:
        """Unit directions (n_latents, d_model) and the lengths they had, zero where there is no direction."""
        positive, negative = self.components.split(self.d_model, dim=1)
        signed = positive - negative
        length = signed.norm(dim=1)
        exists = length > _NO_DIRECTION
        directions = F.normalize(torch.where(exists[:, None], signed, positive), dim=1)
        return directions, torch.where(exists, length, 0)

    def _split_rows(self, batches: Iterable[Tensor], size: int) -> Iterator[Tensor]:
        """The rows centred and split, `size` at a time however `batches` cuts them."""
        held: list[Tensor] = []
        n_held = 0
        for batch in batches:
            for rows in batch.split(size):
                held.append(rows.to(self.mean))
                n_held += len(rows)
                if n_held >= size:
                    joined = torch.cat(held)
                    yield _split(joined[:size] - self.mean)
                    held, n_held = [joined[size:]], n_held - size
        if n_held:
            yield _split(torch.cat(held) - self.mean)


class _Learner:
    """Components and the fading sums ZᵀZ and ZᵀX that they are fitted to."""

    def __init__(self, components: Tensor, group: Group) -> None:
        self.components, self._group = components, group
        n_latents = len(components)
        self._codes_codes = components.new_zeros(n_latents, n_latents)
        self._codes_rows = torch.zeros_like(components)
        self._seen = 0
        self.memory = 0.0

    def learn(self, mini_batches: Iterator[Tensor], pass_rows: int) -> float:
        """One pass; the objective with the components that each mini-batch met."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.components.device)
        for mini_batch in mini_batches:
            rows = self._group.share(mini_batch)
            gram, correlations = self.components @ self.components.T, rows @ self.components.T
            codes = nonnegative_codes(gram, correlations, steps=_CODE_STEPS, tolerance=1e-4)
            # |x - zH|² = |x|² - z·(2c - zG): no (rows, 2 d_model) reconstruction is made.
            energy = rows.square().sum(dtype=torch.float64)
            explained = (codes * (2 * correlations - codes @ gram)).sum(dtype=torch.float64)
            sums += torch.stack([energy - explained, energy])
            codes_codes, codes_rows = codes.T @ codes, codes.T @ rows
            self._group.sum_(codes_codes, codes_rows)
            n_rows = len(mini_batch)
            self._seen += n_rows
            self.memory = min(pass_rows, max(n_rows, self._seen / _MEMORY_SHARE))
            keep = max(0.0, 1 - n_rows / self.memory)
            self._codes_codes.mul_(keep).add_(codes_codes)
            self._codes_rows.mul_(keep).add_(codes_rows)
            self._update()
        self._group.sum_(sums)
        error, total = sums.tolist()
        return max(error / total, 0.0)

    def _update(self) -> None:
        """Components nearer to the least of |Z H - X|² on the sums, every coordinate a row of one problem.

        A component that no row has used lately keeps its values: zero would end it for good.
        """
        use = self._codes_codes.diagonal()
        used = use > 1e-10 * use.max()
        gram = self._codes_codes * used * used[:, None]
        columns = nonnegative_codes(
            gram, self._codes_rows.T, steps=_COMPONENT_STEPS, tolerance=0.0, start=self.components.T
        )
        updated = columns.T.contiguous()
        changed = used & (updated.amax(dim=1) > 0)
        self.components = torch.where(changed[:, None], updated, self.components)


def _split(x: Tensor) -> Tensor:
    """(rows, d_model) to (rows, 2 d_model): positive part, then negative part."""
    return torch.cat([x.clamp(min=0), (-x).clamp(min=0)], dim=1)


def _start(rows: Tensor, n_latents: int, generator: torch.Generator) -> Tensor:
    """NNDSVD of the rows with its zeros filled; components beyond its rank are rows drawn at random."""
    exact = rows.double()
    squares, vectors = torch.linalg.eigh(exact.T @ exact)
    rank = min(n_latents, *rows.shape)
    length, right = squares.flip(0)[:rank].clamp(min=1e-12 * squares[-1]).sqrt(), vectors.flip(1)[:, :rank]
    left = exact @ right / length
    # A singular pair splits into two non-negative ones; the heavier is kept.
    weights = [(s * left).clamp(min=0).norm(dim=0) * (s * right).clamp(min=0).norm(dim=0) for s in (1, -1)]
    sign = torch.where(weights[0] >= weights[1], 1.0, -1.0).to(exact)
    kept = F.normalize((sign * right).clamp(min=0), dim=0)
    first = (length * torch.maximum(*weights)).sqrt() * kept
    drawn = torch.randint(len(rows), (n_latents - rank,), generator=generator).to(rows.device)
    start = torch.cat([first.T, exact[drawn]])
    noise = torch.rand(start.shape, generator=generator, dtype=torch.float64).to(rows.device)
    return torch.where(start < 1e-6 * start.max(), 2 * exact.mean() * noise, start).to(rows)
