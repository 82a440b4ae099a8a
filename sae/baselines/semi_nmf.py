"""Semi-non-negative matrix factorisation: codes only add up, directions have signs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Float, Float64
from torch import Tensor
from torch.nn import functional as F

from sae.baselines.base import Baseline
from sae.baselines.nmf_solvers import SWEEP_ROWS, OnlineLearner, SweepLearner
from sae.baselines.rows import first_rows, mini_batches, require_several_passes
from sae.baselines.sweeps import check_passes, learn_until_settled, warn_if_unsettled
from sae.errors import InputError
from sae.ops.block_pivoting import exact_nonnegative_codes
from sae.ops.group import ALONE, Group
from sae.ops.moments import Moments
from sae.ops.pursuit import nonnegative_pursuit
from sae.ops.sparse import SparseLatents

# Rows the start is drawn from.
_START_ROWS = 10_000
# Added to the unit diagonal of the scaled ZᵀZ, and by what it grows until the system can be solved: lost in
# rounding where it can be solved without, else what the codes do not determine stays as it was.
# Sums of approximate codes in float32 say nothing below the larger one.
_RIDGE, _ONLINE_RIDGE, _GROWTH = 1e-13, 1e-5, 10
# Steps of the codes of a mini-batch: directions of both signs overlap, and few steps leave much.
_CODE_STEPS = 50
SOLVERS = ("online", "sweeps")
"""What `SemiNMF(solver=...)` takes."""
# A squared distance below this between unit rows counts as none.
_SAME = 1e-10


class SemiNMF(Baseline):
    """X - mean ≈ z @ directions, z >= 0: an autoencoder's decoder with the best codes instead of an encoder.

    Directions are the least-squares solution of sums ZᵀZ and ZᵀX over the codes, scaled to unit length.
    `solver` says when: "online" after every mini-batch, with sums that slowly forget and codes that are
    nearly the best; "sweeps" after every full pass with exact codes, so that no pass raises the objective,
    at tens of times the cost. Memory does not grow with the rows. The start is drawn as by k-means++ among
    unit rows of the data, and like k-means, to which it is close where codes have one entry, it ends in a
    local minimum that depends on the seed. A direction that no row uses keeps its values.

    There may be more latents than dimensions, but nothing asks dense codes to be sparse: d_model + 1
    directions that surround the mean already explain every row, and the fit ends as soon as they do.

    References:
        "Convex and Semi-Nonnegative Matrix Factorizations", Ding, Li & Jordan, 2010. Theirs updates codes
        by ratios; ours are exact.
        "k-means++: The Advantages of Careful Seeding", Arthur & Vassilvitskii, 2007 (the start).
    """

    revision = 2  # fewer rows in the sums before it may end

    components: Tensor

    def __init__(
        self,
        d_model: int,
        n_latents: int,
        passes: int = 200,
        tolerance: float = 3e-4,
        seed: int = 0,
        solver: str = "online",
    ) -> None:
        """Makes an unfitted factorisation.

        Args:
            d_model: Width of a row.
            n_latents: Directions.
            passes: The most passes over the rows.
            tolerance: Relative fall of the objective over one pass at which the fit ends.
            seed: Of the start.
            solver: How directions are learned: online or sweeps.
        """
        super().__init__(d_model, n_latents)
        check_passes(passes, tolerance)
        if solver not in SOLVERS:
            raise InputError(f"`solver` must be one of {', '.join(SOLVERS)}, got solver={solver!r}.")
        self.passes, self.tolerance, self.seed, self.solver = passes, tolerance, seed, solver
        self.register_buffer("components", torch.zeros(n_latents, d_model))

    @property
    def inference(self) -> str:
        """The non-negative least-squares code, on the saved tensors."""
        return (
            "latents = argmin over z >= 0 of |x - b_dec - z @ W_dec|^2; x_hat = latents @ W_dec + b_dec "
            "(with more latents than dimensions z may not be unique: any of them)"
        )

    @property
    def config(self) -> dict[str, Any]:
        """Constructor's arguments."""
        names = ("d_model", "n_latents", "passes", "tolerance", "seed", "solver")
        return {name: getattr(self, name) for name in names}

    @property
    def directions(self) -> Float[Tensor, "n_latents d_model"]:
        """The components: unit rows, of both signs."""
        self._require_fit()
        return self.components

    @torch.no_grad()
    def fit(self, batches: Iterable[Tensor], moments: Moments, group: Group = ALONE) -> SemiNMF:
        """Learns the directions; warns where `passes` ends it before `tolerance` does.

        Ranks share the codes of every mini-batch and add up its statistics.

        Raises:
            InputError: if `batches` cannot be read again or has no row but the mean.
        """
        self._start_fit(moments)
        require_several_passes(batches)
        head = first_rows(batches, _START_ROWS, self.mean).to(self.mean)
        start = spread_rows(head - self.mean, self.n_latents, torch.Generator().manual_seed(self.seed))
        group.of_first_(start)  # other machines may round otherwise
        kind = _OnlineLeastSquares if self.solver == "online" else _LeastSquares
        learner = kind(start, group)
        n_rows = sum(len(rows) for rows in batches)
        size = learner.batch_rows(n_rows)
        reached = learn_until_settled(
            learner,
            lambda: (rows.to(self.mean) - self.mean for rows in mini_batches(batches, size, self.mean)),
            n_rows,
            passes=self.passes,
            tolerance=self.tolerance,
        )
        warn_if_unsettled(reached, self.tolerance, "SemiNMF")
        self.components.copy_(F.normalize(learner.components, dim=1))
        group.of_first_(self.components)
        self.fitted.fill_(True)
        return self

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... n_latents"]:
        """The non-negative least-squares code of x - mean."""
        centred = self._centred(x).reshape(-1, self.d_model)
        return self._codes(centred).reshape(*x.shape[:-1], self.n_latents)

    @torch.no_grad()
    def sparse_code(self, x: Float[Tensor, "rows d_model"], k: int) -> SparseLatents:
        """Non-negative pursuit of x - mean, coefficients refitted by least squares.

        Where k allows all directions there is nothing to pursue: the code of `encode`.
        """
        if k >= self.n_latents:
            return self.encode_sparse(x)
        return nonnegative_pursuit(self._centred(x), self.directions, k)

    @torch.no_grad()
    def objective(self, batches: Iterable[Tensor]) -> float:
        """|X - mean - Z directions|² / |X - mean|² over all rows."""
        self._require_fit()
        error = total = 0.0
        for rows in mini_batches(batches, SWEEP_ROWS, self.mean):
            centred = rows.to(self.mean) - self.mean
            left = centred - self._codes(centred) @ self.components
            error += left.double().square().sum().item()
            total += centred.double().square().sum().item()
        return error / total

    def saved_tensors(self) -> dict[str, Tensor]:
        """Unit directions and mean; the rule is `inference`."""
        return {"W_dec": self.directions.clone(), "b_dec": self.mean.clone()}

    @torch.no_grad()
    def load_saved_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes both."""
        self._load(tensors, components="W_dec", mean="b_dec")

    def _codes(self, centred: Tensor) -> Tensor:
        if len(centred) == 0:
            return centred.new_zeros(0, self.n_latents)
        exact = self.components.double()
        return exact_nonnegative_codes(exact @ exact.T, centred.double() @ exact.T).to(centred)


class _LeastSquares(SweepLearner):
    """The components nearest to the rows, given the exact codes of a pass."""

    def improved(
        self,
        codes_codes: Float[Tensor, "n n"],
        codes_rows: Float[Tensor, "n d_model"],
        components: Float[Tensor, "n d_model"],
    ) -> Float[Tensor, "n d_model"]:
        """No larger |X - Z H|²."""
        return nearest_components(codes_codes, codes_rows, components, _RIDGE)


class _OnlineLeastSquares(OnlineLearner):
    """The same on fading sums over mini-batches."""

    def __init__(self, components: Float[Tensor, "n d_model"], group: Group) -> None:
        super().__init__(components, group, _CODE_STEPS)

    def _update(self) -> None:
        sums = self._codes_codes.double(), self._codes_rows.double()
        updated = nearest_components(*sums, self.components.double(), _ONLINE_RIDGE)
        self.components = updated.to(self.components)


def nearest_components(
    codes_codes: Float64[Tensor, "n n"],
    codes_rows: Float64[Tensor, "n d_model"],
    components: Float64[Tensor, "n d_model"],
    ridge: float,
) -> Float64[Tensor, "n d_model"]:
    """Least |X - Z H|² + ridge |H - components|², in units of ZᵀZ: no larger |X - Z H|², whatever the ridge.

    Solved as a step from the components, so that those which are best already, or unused, stay as they are.

    Raises:
        InputError: if the sums are not finite.
    """
    if not (codes_codes.isfinite().all() and codes_rows.isfinite().all()):
        raise InputError("rows must be small enough to be squared in float32, got sums that are not finite.")
    use = codes_codes.diagonal().sqrt()
    inverse = torch.where(use > 0, 1 / use, 1)[:, None]
    slope = inverse * (codes_rows - codes_codes @ components)
    system, failed = inverse * codes_codes * inverse.T, True
    while failed:
        shifted = system + ridge * torch.eye(len(system)).to(system)
        factor, info = torch.linalg.cholesky_ex(shifted)
        ridge, failed = ridge * _GROWTH, bool(info)
    return components + inverse * torch.cholesky_solve(slope, factor)


def spread_rows(
    rows: Float[Tensor, "rows d_model"], n_latents: int, generator: torch.Generator
) -> Float[Tensor, "n_latents d_model"]:
    """Unit rows drawn one by one, each as likely as its squared distance to the nearest drawn before.

    Rows of zeros are never drawn; when all others have been, random directions follow.
    """
    units = F.normalize(rows, dim=1)
    distances = units.square().sum(dim=1)  # of the first draw: all rows alike, but zeros
    drawn = []
    for _ in range(n_latents):
        weights = torch.where(distances > _SAME, distances, 0).double().cpu()
        if weights.sum() > 0:
            ends = weights.cumsum(0)
            aim = torch.rand(1, generator=generator, dtype=torch.float64) * ends[-1]
            place = int(torch.searchsorted(ends, aim, right=True).clamp(max=len(units) - 1))
            direction = units[place]
        else:
            noise = torch.randn(rows.shape[1], generator=generator, dtype=torch.float64)
            direction = F.normalize(noise, dim=0).to(rows)
        drawn.append(direction)
        distances = torch.minimum(distances, (2 - 2 * (units @ direction)).clamp(min=0))
    return torch.stack(drawn)
