"""Non-negative matrix factorisation of signed rows, learned from mini-batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from sae.baselines.base import Baseline
from sae.baselines.nmf_solvers import SOLVERS, OnlineLearner, learner_of, nndsvd_start
from sae.baselines.rows import mini_batches, require_several_passes
from sae.baselines.signed_rows import TREATMENTS
from sae.baselines.split_merge import leave_local_minima
from sae.baselines.sweeps import check_energy, check_passes, learn_until_settled, warn_if_unsettled
from sae.errors import InputError
from sae.ops.group import ALONE, Group
from sae.ops.moments import Moments
from sae.ops.nonnegative import nonnegative_codes
from sae.ops.pursuit import nonnegative_pursuit, orthogonal_pursuit
from sae.ops.sparse import SparseLatents, from_dense

# Rows the start is made from, and rows worked on at a time where no solver asks for a number.
_START_ROWS = 10_000
_MAX_ROWS = 1024


class NMF(Baseline):
    """Parts that only add up: S ≈ z @ components, all entries >= 0, S made of the rows by `signs`.

    - "split": S = [relu(x - mean), relu(mean - x)], (rows, 2 d_model). In signed space component j stands
      for H⁺[j] - H⁻[j], its two halves; `directions` holds these as unit rows, latents are z times their
      lengths, all >= 0.
    - "stack": S has a row relu(x - mean) and a row relu(mean - x) for every x; components are (n_latents,
      d_model) and latents z⁺ - z⁻, of both signs.
    - "shift": S = x - floor, floor the least value of each coordinate in the rows of the fit. A later row
      that lies below it somewhere is taken to lie on it there.
    - "none": S = x, which must be non-negative, in the fit and later.

    Always x_hat = mean + latents @ directions, as for every baseline. So "shift" and "none" count codes
    from the mean's: latents = z - z(mean), of both signs, and what the mean itself cannot be made of by
    the components is not missing in x_hat.

    `solver` says how components are learned: "online" after every mini-batch, from sums ZᵀZ and ZᵀX that
    slowly forget, and when settled by splits and merges of components, as long as they help; "hals" and
    "mu" after every full pass, from the sums of exact codes, so that no pass raises the objective. Memory
    does not grow with the rows, and the result does not depend on how `batches` cuts them. With more
    components than rows or dimensions the factors are not unique: those beyond the rank start as rows
    drawn at random, and some may equal each other or stay unused.

    References:
        "Learning the parts of objects by non-negative matrix factorization", Lee & Seung, 1999.
        Those of the treatments and of the solvers stand there.
    """

    revision = 3  # splits and merges, given up after a pass that is no better

    components: Tensor
    floor: Tensor
    mean_code: Tensor

    def __init__(
        self,
        d_model: int,
        n_latents: int,
        passes: int = 200,
        tolerance: float = 3e-4,
        seed: int = 0,
        signs: str = "split",
        solver: str = "online",
    ) -> None:
        """Makes an unfitted factorisation.

        Args:
            d_model: Width of a row.
            n_latents: Components.
            passes: The most passes over the rows.
            tolerance: Relative fall of the objective over one pass at which the fit ends.
            seed: Of the random part of the start.
            signs: How rows become non-negative: split, shift, stack or none.
            solver: How components are learned: online, hals or mu.
        """
        super().__init__(d_model, n_latents)
        check_passes(passes, tolerance)
        for name, value, known in (("signs", signs, TREATMENTS), ("solver", solver, SOLVERS)):
            if value not in known:
                raise InputError(f"`{name}` must be one of {', '.join(known)}, got {name}={value!r}.")
        self.passes, self.tolerance, self.seed = passes, tolerance, seed
        self.signs, self.solver = signs, solver
        self._treatment = TREATMENTS[signs]
        self.register_buffer("components", torch.zeros(n_latents, self._treatment.halves * d_model))
        if signs == "shift":
            self.register_buffer("floor", torch.zeros(d_model))
        if not self._treatment.about_mean:
            self.register_buffer("mean_code", torch.zeros(n_latents))

    @property
    def inference(self) -> str:
        """The non-negative least-squares code, on the saved tensors."""
        return f"{self._treatment.rule}; x_hat = latents @ W_dec + b_dec"

    @property
    def config(self) -> dict[str, Any]:
        """Constructor's arguments."""
        names = ("d_model", "n_latents", "passes", "tolerance", "seed", "signs", "solver")
        return {name: getattr(self, name) for name in names}

    @property
    def directions(self) -> Float[Tensor, "n_latents d_model"]:
        """What the components stand for, as unit rows; of a split one that cancels, H⁺[j] (latent zero)."""
        self._require_fit()
        return self._treatment.signed(self.components)[0]

    @torch.no_grad()
    def fit(self, batches: Iterable[Tensor], moments: Moments, group: Group = ALONE) -> NMF:
        """Learns the components; warns where `passes` ends it before `tolerance` does.

        Rows should come well mixed, as a cache gives them: of rows sorted by kind the online solver forgets
        the first. Ranks share the codes of every mini-batch and add up its statistics.

        Raises:
            InputError: if `batches` cannot be read again or has no row but the origin, or a row is negative
                where it must not be.
        """
        self._start_fit(moments)
        require_several_passes(batches)
        n_rows = self._survey(batches, group)  # the moments may be of more
        head = next(self._nonnegative_rows(batches, _START_ROWS))
        check_energy(head.square().sum().item())
        start = nndsvd_start(head, self.n_latents, torch.Generator().manual_seed(self.seed))
        group.of_first_(start)  # other machines may round otherwise
        learner = learner_of(self.solver, start, group, self._treatment.about_mean)
        size, pass_rows = learner.batch_rows(n_rows), n_rows * self._treatment.parts

        def sweep() -> Iterator[Tensor]:
            return self._nonnegative_rows(batches, size)

        passes, tolerance = self.passes, self.tolerance
        reached = learn_until_settled(learner, sweep, pass_rows, passes=passes, tolerance=tolerance)
        if reached.settled and isinstance(learner, OnlineLearner):
            learner, reached = leave_local_minima(
                learner, reached, head, sweep, pass_rows, passes=passes, tolerance=tolerance, group=group
            )
        warn_if_unsettled(reached, self.tolerance, "NMF")
        self.components.copy_(F.normalize(learner.components, dim=1))
        if not self._treatment.about_mean:
            self.mean_code.copy_(self._codes(self._nonnegative(self.mean[None]))[0])
            group.of_first_(self.mean_code)
        group.of_first_(self.components)
        self.fitted.fill_(True)
        return self

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... n_latents"]:
        """Non-negative least-squares codes of the treated rows as latents on `directions`."""
        codes = self._treatment.folded(self._codes(self._nonnegative(self._checked(x))))
        if not self._treatment.about_mean:
            codes = codes - self.mean_code
        return (codes * self._treatment.signed(self.components)[1]).reshape(*x.shape[:-1], self.n_latents)

    @torch.no_grad()
    def sparse_code(self, x: Float[Tensor, "rows d_model"], k: int) -> SparseLatents:
        """Orthogonal pursuit of x - mean on `directions`, coefficients refitted by least squares.

        They are non-negative where latents are ("split"), else of both signs. Where k allows all atoms there
        is nothing to pursue: the plain least-squares codes.
        """
        centred, atoms = self._centred(x), self.directions
        if self.signs == "split":
            if k >= self.n_latents:
                return from_dense(nonnegative_codes(atoms @ atoms.T, centred @ atoms.T))
            return nonnegative_pursuit(centred, atoms, k)
        if k >= self.n_latents:
            inverse = torch.linalg.pinv(atoms.double())
            return from_dense((centred.double() @ inverse).to(atoms))
        return orthogonal_pursuit(centred, atoms, k)

    @torch.no_grad()
    def objective(self, batches: Iterable[Tensor]) -> float:
        """|S - Z components|² / |S|² over all rows; for "split" and "stack" |S|² is the centred rows'."""
        self._require_fit()
        error = total = 0.0
        for rows in self._nonnegative_rows(batches, _MAX_ROWS):
            left = rows - self._codes(rows) @ self.components
            error += left.double().square().sum().item()
            total += rows.double().square().sum().item()
        return error / total

    def saved_tensors(self) -> dict[str, Tensor]:
        """Unit directions and mean to decode with, the rest to encode with; the rule is `inference`."""
        return {"W_dec": self.directions, "b_dec": self.mean.clone()} | {
            name: tensor.clone() for name, tensor in self.named_buffers() if name not in ("mean", "fitted")
        }

    @torch.no_grad()
    def load_saved_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes all but W_dec, which follows from the components."""
        own = {name: name for name, _ in self.named_buffers() if name not in ("mean", "fitted")}
        self._load(tensors, mean="b_dec", **own)

    def _codes(self, rows: Tensor) -> Tensor:
        return nonnegative_codes(self.components @ self.components.T, rows @ self.components.T)

    def _checked(self, x: Tensor) -> Tensor:
        """X as rows in the factorisation's own dtype."""
        self._require_fit()
        return self.rows_of(x).to(self.mean.dtype)

    def _nonnegative(self, rows: Tensor) -> Tensor:
        """The treated rows: less their origin, then without signs."""
        if self._treatment.about_mean:
            rows = rows - self.mean
        elif self.signs == "shift":
            rows = rows - self.floor
        return self._treatment.nonnegative(rows)

    def _nonnegative_rows(self, batches: Iterable[Tensor], size: int) -> Iterator[Tensor]:
        """Treated rows of `size` rows at a time, however `batches` cuts them."""
        return (self._nonnegative(rows.to(self.mean)) for rows in mini_batches(batches, size, self.mean))

    def _survey(self, batches: Iterable[Tensor], group: Group) -> int:
        """Counts the rows, and finds their floor or that they have none below zero, where that matters."""
        n_rows, floor = 0, torch.full_like(self.mean, torch.inf)
        for batch in batches:
            n_rows += len(batch)
            if not self._treatment.about_mean:
                rows = torch.cat([floor[None], group.share(batch).to(floor)])
                floor = rows.amin(dim=0)
        if n_rows == 0:
            raise InputError("`batches` must give at least one row, got none.")
        group.max_(floor.neg_())
        floor.neg_()
        if self.signs == "shift":
            self.floor.copy_(floor)
        elif self.signs == "none":
            self._treatment.nonnegative(floor[None])
        return n_rows
