"""Dictionary learning with signed codes of k entries: online, or by K-SVD on rows in memory."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from sae.baselines.atoms import KSVDAtoms, OnlineAtoms, doubles
from sae.baselines.base import Baseline
from sae.baselines.linear import pseudo_inverse
from sae.baselines.rows import count_rows, first_rows, mini_batches, require_several_passes
from sae.errors import InputError
from sae.ops.group import ALONE, Group
from sae.ops.moments import Moments
from sae.ops.pursuit import orthogonal_pursuit
from sae.ops.sparse import SparseLatents, from_dense

METHODS = ("online", "ksvd")
# Rows the start is drawn from (n_latents if that is more), rows of a mini-batch, rows that K-SVD can hold.
_START_ROWS, _MIN_ROWS, _MAX_ROWS = 10_000, 256, 1024
_KSVD_ROWS = 100_000
# An objective below this is float32 rounding.
_ROUNDING = 1e-9


class DictionaryLearning(Baseline):
    """Any number of unit atoms, on which k signed coefficients reconstruct a row best: x ≈ mean + z @ atoms.

    It is what a sparse autoencoder is, without an encoder and without a sign: codes come from orthogonal
    matching pursuit. Atoms start as rows drawn at random. Method "online" passes over mini-batches, and its
    memory does not grow with the rows; "ksvd" holds the rows and converges in fewer passes. Between passes an
    atom that no code had, or that is the double of an earlier one, becomes one of the rows explained worst.

    References:
        "Online Dictionary Learning for Sparse Coding", Mairal, Bach, Ponce & Sapiro, 2009, and
        arXiv:0908.0050 (there codes are penalised by their L1 norm). "K-SVD: An Algorithm for Designing
        Overcomplete Dictionaries for Sparse Representation", Aharon, Elad & Bruckstein, 2006.
        "Efficient Implementation of the K-SVD Algorithm using Batch Orthogonal Matching Pursuit",
        Rubinstein, Zibulevsky & Elad, 2008.
    """

    components: Tensor

    def __init__(
        self,
        d_model: int,
        n_latents: int,
        k: int,
        method: str = "online",
        passes: int = 10,
        tolerance: float = 1e-3,
        seed: int = 0,
    ) -> None:
        """Makes an unfitted dictionary.

        Args:
            d_model: Width of a row.
            n_latents: Atoms, also more than d_model.
            k: Coefficients of a row, in learning and in `encode`.
            method: "online" or "ksvd" (at most 100,000 rows; the first ones where there are more).
            passes: The most passes over the rows.
            tolerance: Relative change of the objective over one pass at which the fit ends, where no atom was
                replaced before that pass.
            seed: Of the start.
        """
        super().__init__(d_model, n_latents)
        if not 1 <= k <= n_latents:
            raise InputError(
                f"`k` must be in [1, n_latents={n_latents}], got k={k}; lower k or raise n_latents."
            )
        if method not in METHODS:
            raise InputError(f"`method` must be one of {', '.join(METHODS)}, got {method!r}.")
        for name, value, least in (("passes", passes, 1), ("tolerance", tolerance, 0)):
            if value < least:
                raise InputError(f"`{name}` must be at least {least}, got {name}={value}.")
        self.k, self.method, self.passes, self.tolerance, self.seed = k, method, passes, tolerance, seed
        self.register_buffer("components", torch.zeros(n_latents, d_model))

    @property
    def inference(self) -> str:
        """The pursuit, on the saved tensors."""
        return (
            f"latents = orthogonal matching pursuit of x - b_dec on the rows of W_dec, {self.k} at most: "
            "choose the largest |correlation| with what is left, refit all chosen by least squares; "
            "x_hat = latents @ W_dec + b_dec"
        )

    @property
    def config(self) -> dict[str, Any]:
        """Constructor's arguments."""
        names = ("d_model", "n_latents", "k", "method", "passes", "tolerance", "seed")
        return {name: getattr(self, name) for name in names}

    @property
    def directions(self) -> Float[Tensor, "n_latents d_model"]:
        """The atoms."""
        self._require_fit()
        return self.components

    @torch.no_grad()
    def fit(self, batches: Iterable[Tensor], moments: Moments, group: Group = ALONE) -> DictionaryLearning:
        """Learns the atoms; warns where `passes` ends it before `tolerance` does.

        Ranks share the codes of every mini-batch and add up its statistics.
        """
        self._start_fit(moments)
        require_several_passes(batches)
        n_rows = count_rows(batches)
        if n_rows < self.n_latents:
            raise InputError(
                f"`n_latents` must be at most the number of rows, {n_rows}, got n_latents={self.n_latents}; "
                "lower it or give more rows."
            )
        learner = self._learner(batches, n_rows, group)
        before, change, replaced = torch.inf, torch.inf, 0
        for n_pass in range(self.passes):
            found = learner.learn()
            change, before = 1 - found.objective / before, found.objective
            # A new atom needs a pass to take rows over, and the objective may not show it at once.
            if found.objective < _ROUNDING or (abs(change) < self.tolerance and not replaced):
                break
            if n_pass + 1 < self.passes:  # else nothing would follow to learn them
                replaced = _replace_idle(learner, found.used, found.worst)
        else:
            warnings.warn(
                f"DictionaryLearning stopped after passes={self.passes}: the last one changed the objective "
                f"by {change:.2g} of itself, tolerance={self.tolerance:g}, after {replaced} atoms had been "
                "replaced; raise `passes`.",
                stacklevel=3,  # past the wrapper of no_grad
            )
        self.components.copy_(F.normalize(learner.atoms, dim=1))
        group.of_first_(self.components)
        self.fitted.fill_(True)
        return self

    def encode(self, x: Float[Tensor, "... d_model"]) -> Float[Tensor, "... n_latents"]:
        """The code of k entries, with its zeros."""
        latents = self.encode_sparse(x).to_dense(self.n_latents)
        return latents.reshape(*x.shape[:-1], self.n_latents)

    def encode_sparse(self, x: Float[Tensor, "... d_model"]) -> SparseLatents:
        """The code of k entries."""
        return self.sparse_code(self.rows_of(x), self.k)

    def sparse_code(self, x: Float[Tensor, "rows d_model"], k: int) -> SparseLatents:
        """Orthogonal matching pursuit of x - mean; where k allows all atoms, the least-squares code."""
        centred, atoms = self._centred(x), self.directions
        if k >= self.n_latents:
            return from_dense(centred @ pseudo_inverse(atoms).to(centred.dtype))
        return orthogonal_pursuit(centred, atoms, k)

    def saved_tensors(self) -> dict[str, Tensor]:
        """Unit atoms and the mean; the rule is `inference`."""
        return {"W_dec": self.directions.clone(), "b_dec": self.mean.clone()}

    @torch.no_grad()
    def load_saved_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes W_dec and b_dec."""
        self._load(tensors, components="W_dec", mean="b_dec")

    def _learner(self, batches: Iterable[Tensor], n_rows: int, group: Group) -> OnlineAtoms | KSVDAtoms:
        held = _KSVD_ROWS if self.method == "ksvd" else max(_START_ROWS, self.n_latents)
        rows = first_rows(batches, held, self.mean).to(self.mean).sub_(self.mean)
        start = _drawn(rows, self.n_latents, torch.Generator().manual_seed(self.seed))
        group.of_first_(start)
        if self.method == "ksvd":
            if n_rows > _KSVD_ROWS:
                warnings.warn(
                    f"K-SVD learns from the first {_KSVD_ROWS:,} of {n_rows:,} rows, which it holds in "
                    'memory; give fewer, or take method="online".',
                    stacklevel=4,  # past fit and the wrapper of no_grad
                )
            return KSVDAtoms(start, self.k, rows, group)
        size = min(max(n_rows // 64, _MIN_ROWS), _MAX_ROWS)

        def centred() -> Iterator[Tensor]:
            for mini_batch in mini_batches(batches, size, self.mean):
                yield mini_batch.to(self.mean) - self.mean

        return OnlineAtoms(start, self.k, centred, n_rows, group)


def _drawn(rows: Tensor, n_latents: int, generator: torch.Generator) -> Tensor:
    """Rows drawn at random, as unit atoms; random directions where a row is zero or there are too few."""
    atoms = torch.randn(n_latents, rows.shape[1], generator=generator).to(rows)
    chosen = torch.randperm(len(rows), generator=generator)[:n_latents].to(rows.device)
    drawn = rows[chosen]
    atoms[: len(drawn)] = torch.where(drawn.norm(dim=1, keepdim=True) > 0, drawn, atoms[: len(drawn)])
    return F.normalize(atoms, dim=1)


def _replace_idle(learner: OnlineAtoms | KSVDAtoms, used: Tensor, worst: Tensor) -> int:
    """Atoms without use, and doubles, become rows explained worst, as many as there are of both: how many."""
    candidates = F.normalize(worst, dim=1)
    candidates = candidates[~doubles(candidates)] if len(candidates) else candidates
    idle = (~used | doubles(learner.atoms)).nonzero().squeeze(1)[: len(candidates)]
    learner.replace(idle, candidates[: len(idle)])
    return len(idle)
