"""How unit atoms follow from sparse codes: by fading sums, or one after the other on rows in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae.baselines.rows import Worst
from sae.ops.group import Group
from sae.ops.pursuit import orthogonal_pursuit
from sae.ops.slots import from_slots
from sae.ops.sparse import SparseLatents, sorted_by_latent, sparse_decode

# The sums remember 1/20 of the rows seen, at most one pass: codes of atoms that have moved since mislead.
_MEMORY_SHARE = 20
# Atoms updated between two products with all others.
_BLOCK = 64
# A squared residual below this share of |x|² is rounding.
_ROUNDING = 1e-10
# Two atoms with a larger |cos| are one.
_SAME = 0.99
# A length that nothing is divided by.
_TINY = 1e-30


class PassResult(NamedTuple):
    """What a pass leaves to say and to mend."""

    objective: float
    """Squared residuals over squared rows."""
    used: Bool[Tensor, " n_latents"]
    """Atoms that some row's code had."""
    worst: Float[Tensor, "few d_model"]
    """Rows that were explained worst, worst first."""


class OnlineAtoms:
    """Atoms fitted to the fading sums A = ZᵀZ and B = ZᵀX, mini-batch after mini-batch.

    References:
        "Online Dictionary Learning for Sparse Coding", Mairal, Bach, Ponce & Sapiro, 2009, and
        arXiv:0908.0050 (algorithm 2; here every atom has unit norm, since a pursuit's coefficients are free).
    """

    def __init__(
        self,
        atoms: Float[Tensor, "n_latents d_model"],
        k: int,
        mini_batches: Callable[[], Iterator[Tensor]],
        pass_rows: int,
        group: Group,
    ) -> None:
        self.atoms, self._k, self._mini_batches, self._group = atoms, k, mini_batches, group
        self._codes_codes = atoms.new_zeros(len(atoms), len(atoms))
        self._codes_rows = torch.zeros_like(atoms)
        self._seen, self._pass_rows = 0, pass_rows

    def learn(self) -> PassResult:
        """One pass; its result is of the atoms that each mini-batch met."""
        sums = self.atoms.new_zeros(2, dtype=torch.float64)
        used = self.atoms.new_zeros(len(self.atoms))
        worst = Worst(len(self.atoms), self.atoms[0])
        for mini_batch in self._mini_batches():
            rows = self._group.share(mini_batch)
            codes = orthogonal_pursuit(rows, self.atoms, self._k).to_dense(len(self.atoms))
            errors, energy = _errors(rows, rows - codes @ self.atoms)
            sums += torch.stack([errors.sum(dtype=torch.float64), energy.sum(dtype=torch.float64)])
            worst.add(rows, errors)
            codes_codes, codes_rows = codes.T @ codes, codes.T @ rows
            self._group.sum_(codes_codes, codes_rows)
            used += codes_codes.diagonal()
            self._seen += len(mini_batch)
            memory = min(self._pass_rows, max(len(mini_batch), self._seen / _MEMORY_SHARE))
            keep = max(0.0, 1 - len(mini_batch) / memory)
            self._codes_codes.mul_(keep).add_(codes_codes)
            self._codes_rows.mul_(keep).add_(codes_rows)
            self.atoms = descended(self.atoms, self._codes_codes, self._codes_rows)
        self._group.sum_(sums)
        self._group.of_first_(self.atoms)  # other machines may round otherwise
        worst.join(self._group)
        return PassResult((sums[0] / sums[1]).item(), used > 0, worst.rows)

    def replace(self, which: Tensor, atoms: Tensor) -> None:
        """Sets atoms anew, and forgets what the sums say of the old ones."""
        self.atoms[which] = atoms
        self._codes_codes[which], self._codes_codes[:, which], self._codes_rows[which] = 0, 0, 0


class KSVDAtoms:
    """Atoms each set to the best direction for the rows that use it, one after the other, all rows in memory.

    Ranks share the codes, which take nearly all the time; then each updates all atoms.

    References:
        "K-SVD: An Algorithm for Designing Overcomplete Dictionaries for Sparse Representation", Aharon, Elad
        & Bruckstein, 2006. "Efficient Implementation of the K-SVD Algorithm using Batch Orthogonal Matching
        Pursuit", Rubinstein, Zibulevsky & Elad, 2008 (one power step instead of an SVD).
    """

    def __init__(
        self,
        atoms: Float[Tensor, "n_latents d_model"],
        k: int,
        rows: Float[Tensor, "rows d_model"],
        group: Group,
    ) -> None:
        self.atoms, self._k, self._rows, self._group = atoms, k, rows, group

    def learn(self) -> PassResult:
        """Codes of all rows, then every atom once; its result is of the updated atoms and coefficients."""
        code = self._codes()
        left = self._rows - sparse_decode(code, self.atoms)
        order, rows, offsets = sorted_by_latent(code, len(self.atoms))
        bounds = offsets.tolist()
        for atom, (begin, end) in enumerate(zip(bounds, bounds[1:], strict=False)):
            if begin == end:
                continue
            users, weights = rows[begin:end], code.values[order[begin:end]]
            without = left[users].addr_(weights, self.atoms[atom])
            direction = without.T @ weights
            norm = direction.norm()
            # All rows of an atom may be explained by others: then it keeps its direction.
            self.atoms[atom] = torch.where(norm > 0, direction / norm, self.atoms[atom])
            left[users] = without.addr_(without @ self.atoms[atom], self.atoms[atom], alpha=-1)
        errors, energy = _errors(self._rows, left)
        objective = errors.sum(dtype=torch.float64) / energy.sum(dtype=torch.float64)
        worst = Worst(len(self.atoms), self.atoms[0])
        worst.add(self._rows, errors)
        self._group.of_first_(self.atoms, objective)  # other machines may round otherwise
        return PassResult(objective.item(), offsets.diff() > 0, worst.rows)

    def replace(self, which: Tensor, atoms: Tensor) -> None:
        """Sets atoms anew."""
        self.atoms[which] = atoms

    def _codes(self) -> SparseLatents:
        code = orthogonal_pursuit(self._group.share(self._rows), self.atoms, self._k)
        if self._group.world == 1:
            return code
        values = code.values.new_zeros(code.n_rows, self._k)
        indices = code.indices.new_zeros(code.n_rows, self._k)
        rows = code.rows
        slots = torch.arange(len(rows), device=rows.device) - code.row_offsets[rows]
        values[rows, slots], indices[rows, slots] = code.values, code.indices
        return from_slots(self._group.gather(values), self._group.gather(indices))


def descended(
    atoms: Float[Tensor, "n_latents d_model"],
    codes_codes: Float[Tensor, "n_latents n_latents"],
    codes_rows: Float[Tensor, "n_latents d_model"],
) -> Float[Tensor, "n_latents d_model"]:
    """Every unit atom once at the least of |X - Z D|² with the others as they then are, in their order.

    Products with all atoms are made block by block; within a block the moves of its earlier atoms are added
    up. An atom that no code has keeps its values.
    """
    learned = atoms.clone()
    used = (codes_codes.diagonal() > 0).tolist()
    for begin in range(0, len(atoms), _BLOCK):
        own = slice(begin, begin + _BLOCK)
        among, old = codes_codes[own, own], atoms[own]
        aims = codes_rows[own] - codes_codes[own] @ learned + among.diagonal()[:, None] * old
        moves = torch.zeros_like(aims)
        for i in range(len(aims)):
            if used[begin + i]:
                aim = torch.addmv(aims[i], moves.T, among[i], alpha=-1)
                moves[i] = aim.div_(aim.norm().clamp_min_(_TINY)).sub_(old[i])
        learned[own] += moves
    lengths = learned.norm(dim=1, keepdim=True)
    return torch.where(lengths > 0, learned / lengths, atoms)


def doubles(atoms: Float[Tensor, "n_latents d_model"]) -> Bool[Tensor, " n_latents"]:
    """Atoms that are all but the same line as an earlier one."""
    parts = []
    for begin in range(0, len(atoms), _BLOCK):
        block = atoms[begin : begin + _BLOCK]
        same = (block @ atoms.T).abs() > _SAME
        parts.append(same.tril(diagonal=begin - 1).any(dim=1))
    return torch.cat(parts)


def _errors(rows: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    """|residual|² and |x|² of every row, rounding taken for zero."""
    errors, energy = left.square().sum(1), rows.square().sum(1)
    return torch.where(errors > _ROUNDING * energy, errors, 0), energy
