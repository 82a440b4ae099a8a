"""Codes by matching pursuit: greedy rounds, one coefficient each; cheap enough for a training step."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sae.errors import InputError
from sae.ops.slots import check_k, energy_to_leave, from_slots, gram_if_it_pays, rows_at_once, working_copy
from sae.ops.sparse import SparseLatents

# A correlation below this many roundings of |x| counts as none.
_ROUNDINGS = 16
# The atoms are searched as this many columns, which vector instructions compare side by side.
_COLUMNS = 32


@torch.no_grad()
def matching_pursuit(
    x: Float[Tensor, "rows d_model"],
    atoms: Float[Tensor, "n_latents d_model"],
    k: int,
    residual_threshold: float | Float[Tensor, " rows"] = 0.0,
    first: Int[Tensor, " rows"] | None = None,
) -> SparseLatents:
    """Non-negative matching pursuit: k rounds a row, so at most k atoms, with coefficients > 0.

    A round takes the atom with the largest positive correlation with the residual, adds that correlation
    to its coefficient and subtracts it from the residual. Nothing is refitted: an atom chosen again only
    grows. A row stops early when no correlation is positive or when its residual is small enough.
    |residual|² falls by the squared correlation in every round, the atoms being unit rows, so the norms
    cost nothing; in float32 they are right to about 1e-3 |x|.

    Args:
        x: Rows, already centred.
        atoms: Unit rows.
        k: Rounds.
        residual_threshold: Share of |x| at which a row stops; one for all rows or one for each.
        first: For each row an atom that must be chosen in the first round, or -1. Its coefficient is its
            correlation, at least 0; the round is spent either way.

    References:
        "Matching pursuits with time-frequency dictionaries", Mallat & Zhang, 1993. As the encoder of an
        autoencoder: "From Flat to Hierarchical: Extracting Sparse Representations with Matching Pursuit",
        Costa et al., 2025, arXiv:2506.03093 (whose coefficients may be negative; here never).
    """
    check_k(k, len(atoms))
    _check_first(first, len(atoms))
    exact = working_copy(atoms)
    rows = x.to(exact.dtype)
    gram = gram_if_it_pays(exact, len(rows), k)
    energy = rows.double().square().sum(1)
    enough = energy_to_leave(energy, residual_threshold)
    forced = torch.full_like(enough, -1, dtype=torch.int64) if first is None else first
    size = rows_at_once(len(atoms), rows.device)
    chunks = zip(*(side.split(size) for side in (rows, energy, enough, forced)), strict=True)
    parts = [_pursue(exact, gram, k, *chunk) for chunk in chunks]
    values, indices = (torch.cat(side) for side in zip(*parts, strict=True))
    return from_slots(values.to(atoms.dtype), indices)


def _pursue(
    atoms: Tensor, gram: Tensor | None, k: int, x: Tensor, energy: Tensor, enough: Tensor, first: Tensor
) -> tuple[Tensor, Tensor]:
    """Coefficients and atoms of every row, (rows, k) each; slots never filled hold zero."""
    values, chosen = x.new_zeros(len(x), k), first.new_full((len(x), k), -1)
    floor = (_ROUNDINGS * torch.finfo(x.dtype).eps * energy.sqrt()).to(x.dtype)
    live = torch.arange(len(x), device=x.device)
    residual, correlations = x.clone(), x @ atoms.T
    # Made once: fresh memory in every round would cost several times the update itself.
    picked = torch.empty_like(residual if gram is None else correlations)
    for turn in range(k):
        best, atom = _largest(correlations)
        going = (best > floor) & (energy > enough)
        if turn == 0:
            forced = first >= 0
            atom = torch.where(forced, first, atom)
            best = correlations.gather(1, atom[:, None]).squeeze(1).clamp_(min=0)
            going |= forced
        still = int(going.sum())
        if still == 0:
            break
        if 2 * still < len(live):  # else stopped rows are carried along: copying costs more
            state = (live, best, atom, energy, enough, floor, residual, correlations)
            live, best, atom, energy, enough, floor, residual, correlations = (s[going] for s in state)
        else:
            best = best * going
        slot = _slots(chosen[live, : turn + 1], atom)
        values.index_put_((live, slot), best, accumulate=True)
        chosen[live, slot] = atom
        energy = energy - best.double().square()
        if turn + 1 < k:
            changing, matrix = (residual, atoms) if gram is None else (correlations, gram)
            torch.index_select(matrix, 0, atom, out=picked[: len(live)])
            changing.addcmul_(picked[: len(live)], best[:, None], value=-1)
            if gram is None:
                torch.mm(residual, atoms.T, out=correlations)
    return values, chosen


def _largest(correlations: Tensor) -> tuple[Tensor, Tensor]:
    """The largest entry of every row and where it is."""
    n_latents = correlations.shape[1]
    if n_latents % _COLUMNS or correlations.device.type != "cpu":
        return correlations.max(dim=1)
    # On a processor max(dim=1) looks at one number at a time: first find the best of each column instead.
    table = correlations.unflatten(1, (_COLUMNS, -1))
    best, column = table.amax(1).max(1)
    entries = table.gather(2, column[:, None, None].expand(-1, _COLUMNS, 1)).squeeze(2)
    return best, entries.argmax(1) * table.shape[2] + column


def _slots(chosen: Tensor, atom: Tensor) -> Tensor:
    """The slot of every row that holds `atom` already, else the last one, still free."""
    order = torch.arange(chosen.shape[1], device=chosen.device)
    return torch.where(chosen == atom[:, None], order, order[-1]).amin(1)


def _check_first(first: Tensor | None, n_latents: int) -> None:
    if first is not None and len(first) and not -1 <= int(first.min()) <= int(first.max()) < n_latents:
        raise InputError(
            f"`first` must be in [-1, n_latents={n_latents}), got {int(first.min())} to {int(first.max())};"
            " -1 leaves a row free."
        )
