"""Where the components of an NMF start, and three solvers: from mini-batches, by HALS, by ratios."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from sae.baselines.sweeps import Learner, share_of_energy
from sae.ops.block_pivoting import exact_nonnegative_codes
from sae.ops.group import Group
from sae.ops.nonnegative import nonnegative_codes

# Rows in a mini-batch of the online solver: about 64 updates a pass where the data allows; of the others,
# which update once a pass.
_MIN_ROWS, _MAX_ROWS = 512, 1024
SWEEP_ROWS = 2048
# The statistics remember 1/20 of the rows seen, at most one pass: short while components move, long in
# the end, to average noise away. A fit ends no sooner than they cover one pass or 16,384 rows.
_MEMORY_SHARE, _LONG_MEMORY = 20, 16_384
# Steps of the two least-squares problems of an update: far from exact, and cheaper for the same
# objective. Codes take more where rows are not about the mean: their components overlap.
_CODE_STEPS, _OVERLAPPING_CODE_STEPS, _COMPONENT_STEPS = 10, 30, 10
# Updates of all components on one pass's sums: they cost little beside the codes of the rows.
_CYCLES = 10
# A use of a component below this share of the most used one's is none.
_UNUSED = 1e-10


class OnlineLearner(Learner):
    """Updates after every mini-batch, from fading sums ZᵀZ and ZᵀX; codes take a few steps only.

    References:
        "Online Learning for Matrix Factorization and Sparse Coding", Mairal, Bach, Ponce & Sapiro, 2010,
        arXiv:0908.0050. "Online algorithms for nonnegative matrix factorization with the
        Itakura-Saito divergence", Lefèvre, Bach & Févotte, 2011, arXiv:1106.4198 (forgetting).
    """

    def __init__(self, components: Float[Tensor, "n_latents width"], group: Group, code_steps: int) -> None:
        self.components, self._group, self._code_steps = components, group, code_steps
        n_latents = len(components)
        self._codes_codes = components.new_zeros(n_latents, n_latents)
        self._codes_rows = torch.zeros_like(components)
        self._seen = 0
        self._memory = 0.0

    def restarted(
        self, components: Float[Tensor, "n_latents width"], rows: Float[Tensor, "rows width"]
    ) -> OnlineLearner:
        """A copy at other components, its sums those of `rows`, with the weight of all that it remembers."""
        other = copy.copy(self)
        codes = nonnegative_codes(components @ components.T, rows @ components.T, steps=100, tolerance=1e-4)
        weight = self._memory / len(rows)
        other.components = components
        other._codes_codes, other._codes_rows = weight * codes.T @ codes, weight * codes.T @ rows
        self._group.of_first_(other._codes_codes, other._codes_rows)  # other machines may round otherwise
        return other

    @staticmethod
    def batch_rows(n_rows: int) -> int:
        """Rows in a mini-batch."""
        return min(max(n_rows // 64, _MIN_ROWS), _MAX_ROWS)

    def settled(self, pass_rows: int) -> bool:
        """Whether the sums cover enough rows for their noise to be averaged away."""
        return self._memory >= min(pass_rows, _LONG_MEMORY)

    def learn(self, mini_batches: Iterator[Tensor], pass_rows: int) -> float:
        """One pass; the objective with the components that each mini-batch met."""
        sums = torch.zeros(2, dtype=torch.float64, device=self.components.device)
        for mini_batch in mini_batches:
            rows = self._group.share(mini_batch)
            gram, correlations = self.components @ self.components.T, rows @ self.components.T
            codes = nonnegative_codes(gram, correlations, steps=self._code_steps, tolerance=1e-4)
            # |x - zH|² = |x|² - z·(2c - zG): no (rows, width) reconstruction is made.
            energy = rows.square().sum(dtype=torch.float64)
            explained = (codes * (2 * correlations - codes @ gram)).sum(dtype=torch.float64)
            sums += torch.stack([energy - explained, energy])
            codes_codes, codes_rows = codes.T @ codes, codes.T @ rows
            self._group.sum_(codes_codes, codes_rows)
            n_rows = len(mini_batch)
            self._seen += n_rows
            self._memory = min(pass_rows, max(n_rows, self._seen / _MEMORY_SHARE))
            keep = max(0.0, 1 - n_rows / self._memory)
            self._codes_codes.mul_(keep).add_(codes_codes)
            self._codes_rows.mul_(keep).add_(codes_rows)
            self._update()
        self._group.sum_(sums)
        return share_of_energy(sums)

    def _update(self) -> None:
        """Components nearer to the least of |Z H - X|² on the sums, every coordinate a row of one problem.

        A component that no row has used lately keeps its values: zero would end it for good.
        """
        use = self._codes_codes.diagonal()
        used = use > _UNUSED * use.max()
        gram = self._codes_codes * used * used[:, None]
        columns = nonnegative_codes(
            gram, self._codes_rows.T, steps=_COMPONENT_STEPS, tolerance=0.0, start=self.components.T
        )
        updated = columns.T.contiguous()
        changed = used & (updated.amax(dim=1) > 0)
        self.components = torch.where(changed[:, None], updated, self.components)


class SweepLearner(Learner):
    """Updates after every full pass, from ZᵀZ and ZᵀX of exact codes: the objective cannot rise.

    With the codes fixed an update does not raise |X - Z H|², and the next pass's codes are the best for
    its components. Rows of H are scaled to unit length, which the best codes make up for.
    """

    def __init__(self, components: Float[Tensor, "n_latents width"], group: Group) -> None:
        self.components, self._group = F.normalize(components, dim=1), group

    @staticmethod
    def batch_rows(n_rows: int) -> int:
        """Rows in a mini-batch: only memory depends on them."""
        return SWEEP_ROWS

    def learn(self, mini_batches: Iterator[Tensor], pass_rows: int) -> float:
        """One pass; the objective is that of the components it began with."""
        # In float64, where a singular ZᵀZ can be told from a badly rounded one.
        components = self.components.double()
        gram = components @ components.T
        sums = gram.new_zeros(2)
        codes_codes, codes_rows = torch.zeros_like(gram), torch.zeros_like(components)
        for mini_batch in mini_batches:
            rows = self._group.share(mini_batch).double()
            if len(rows) == 0:  # a rank without a share of the last mini-batch
                continue
            codes = exact_nonnegative_codes(gram, rows @ components.T)
            left = rows - codes @ components
            sums += torch.stack([left.square().sum(), rows.square().sum()])
            codes_codes.addmm_(codes.T, codes)
            codes_rows.addmm_(codes.T, rows)
        self._group.sum_(sums, codes_codes, codes_rows)
        objective = share_of_energy(sums)
        updated = self.improved(codes_codes, codes_rows, components)
        # A component that came out as zero is of no use to these codes: its old values do no harm.
        length = updated.norm(dim=1, keepdim=True)
        kept = torch.where(length > 0, updated / length, self.components)
        self.components = kept.to(self.components)
        return objective

    @abstractmethod
    def improved(self, codes_codes: Tensor, codes_rows: Tensor, components: Tensor) -> Tensor:
        """Components with no larger |X - Z H|² than `components`, which it may overwrite; all float64."""


class HALS(SweepLearner):
    """One component after the other is set to its best values given all others, a few times round.

    References:
        "Fast Local Algorithms for Large Scale Nonnegative Matrix and Tensor Factorizations", Cichocki &
        Phan, 2009. "Accelerated Multiplicative Updates and Hierarchical ALS Algorithms for Nonnegative
        Matrix Factorization", Gillis & Glineur, 2012, arXiv:1107.5194 (several rounds on one set of sums).
    """

    def improved(
        self,
        codes_codes: Float[Tensor, "n n"],
        codes_rows: Float[Tensor, "n width"],
        components: Float[Tensor, "n width"],
    ) -> Float[Tensor, "n width"]:
        """Exact minima over one component at a time; one that would become zero keeps its values."""
        use = codes_codes.diagonal()
        used = (use > _UNUSED * use.max()).nonzero().flatten().tolist()
        for _ in range(_CYCLES):
            for j in used:
                slope = codes_rows[j] - codes_codes[j] @ components
                best = (components[j] + slope / use[j]).clamp_(min=0)
                components[j] = torch.where(best.max() > 0, best, components[j])
        return components


class MultiplicativeUpdates(SweepLearner):
    """Every entry is multiplied by a ratio of two non-negative numbers: slow, and never negative.

    References:
        "Algorithms for Non-negative Matrix Factorization", Lee & Seung, 2000.
    """

    def improved(
        self,
        codes_codes: Float[Tensor, "n n"],
        codes_rows: Float[Tensor, "n width"],
        components: Float[Tensor, "n width"],
    ) -> Float[Tensor, "n width"]:
        """H * ZᵀX / (ZᵀZ H), a few times; entries that nothing uses keep their values."""
        for _ in range(_CYCLES):
            below = codes_codes @ components
            ratio = codes_rows / below
            components = torch.where(below > 0, components * ratio, components)
        return components


SOLVERS = ("online", "hals", "mu")
"""What `NMF(solver=...)` takes."""


def learner_of(
    solver: str, start: Float[Tensor, "n_latents width"], group: Group, about_mean: bool
) -> OnlineLearner | SweepLearner:
    """A solver at its start; `about_mean` says whether the rows were centred before they lost their signs."""
    if solver == "online":
        return OnlineLearner(start, group, _CODE_STEPS if about_mean else _OVERLAPPING_CODE_STEPS)
    return HALS(start, group) if solver == "hals" else MultiplicativeUpdates(start, group)


def nndsvd_start(
    rows: Float[Tensor, "rows width"], n_latents: int, generator: torch.Generator
) -> Float[Tensor, "n_latents width"]:
    """NNDSVD of the rows with its zeros filled; components beyond its rank are rows drawn at random.

    References:
        "SVD based initialization: A head start for nonnegative matrix factorization", Boutsidis &
        Gallopoulos, 2008; we fill its zeros with random values around the mean.
    """
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
