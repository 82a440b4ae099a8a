"""How sets of directions lie to one another."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from jaxtyping import Float, Float64, Num
from scipy import special
from torch import Tensor
from torch.nn import functional as F

from sae.errors import InputError
from sae.ops.capacity import welch_bound
from sae.ops.sparse import SparseLatents

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
"""Of the nearest neighbours' |cos|."""
ANTIPODAL = -0.5
"""Two directions with a cosine below this count as an antipodal pair."""
# Side of a block of cosines (64 MiB), and numbers of a batch's own Gram matrices at a time.
_TILE, _BUDGET = 4096, 2**23


class Cofirings(NamedTuple):
    """Cosines of two latents that fire on one row, mean over all such pairs of all rows; None without any.

    Only pairs that fire together disturb one another. Random directions would give 1 / d_model for
    `mean_square`, about sqrt(2 / (pi d_model)) for `mean_abs` and 0 for `signed`.
    """

    pairs: int
    """Number of (row, pair of latents that fire on it)."""
    mean_square: float | None
    """Of cos²."""
    mean_abs: float | None
    """Of |cos|."""
    signed: float | None
    """Of cos times the signs of both values: negative where what the two add cancels."""


class Geometry(NamedTuple):
    """How n unit directions lie in d_model dimensions; `random_rows` of the same shape are the null."""

    n: int
    d_model: int
    nearest: Float64[Tensor, " quantiles"]
    """`QUANTILES` over rows of the largest |cos| with another row; `nearest_neighbour_null` is its null."""
    nearest_mean: float
    """Its mean."""
    coherence: float
    """The largest |cos| of all pairs."""
    welch: float
    """The least coherence that so many rows can have."""
    mean_square: float
    """Mean cos² over all pairs of different rows; 1 / d_model in expectation for random ones."""
    frame_potential: float
    """Sum of cos² over all ordered pairs, a row with itself included, over its least, max(n, n² / d_model):
    1 = an orthonormal set or a tight frame (Benedetto & Fickus 2003), more = some dimensions are crowded."""
    effective_rank: float
    """exp of the entropy of the singular values, not their squares, over their sum (Roy & Vetterli 2007)."""
    participation_ratio: float
    """(sum of the squared singular values)² / sum of their squares, n² / sum of cos²: at most d_model."""
    antipodal_pairs: int
    """Pairs with cos < `ANTIPODAL`."""
    effective_size: float | None
    """exp of the entropy of how the firing mass is spread over rows: n = evenly, 1 = all on one."""
    cofirings: Cofirings | None
    """Of the codes given."""


def mean_max_cosine(
    truth: Float[Tensor, "n_true d_model"], learned: Float[Tensor, "n_latents d_model"]
) -> float:
    """Mean over the true directions of the largest cosine with a learned one: 1 = all were found.

    Also called MMCS, from truth to learned.

    References:
        Taking features out of superposition with sparse autoencoders, Sharkey, Braun and Millidge 2022.
    """
    cosines = F.normalize(truth, dim=-1) @ F.normalize(learned, dim=-1).to(truth).T
    return float(cosines.max(dim=1).values.mean())


def coherence(directions: Float[Tensor, "n d_model"]) -> float:
    """The largest |cos| between two different rows."""
    unit = F.normalize(directions, dim=-1)
    cosines = (unit @ unit.T).abs()
    return float(cosines.fill_diagonal_(0.0).max())


def nearest_neighbour_cosines(
    directions: Float[Tensor, "n d_model"], chunk: int = 512
) -> Float[Tensor, " n"]:
    """Of each row, the largest |cos| with another row; 0 where there is no other.

    Takes `chunk` rows at a time, so that memory is chunk * n numbers and never n * n.
    """
    unit = F.normalize(directions, dim=-1)
    nearest = unit.new_zeros(len(unit))
    for begin in range(0, len(unit), chunk):
        rows = unit[begin : begin + chunk]
        cosines = (rows @ unit.T).abs()
        cosines[:, begin:].fill_diagonal_(0.0)
        nearest[begin : begin + chunk] = cosines.max(dim=1).values
    return nearest.clamp_max(1.0)


def spread_directions(
    n: int, d_model: int, max_cosine: float, generator: torch.Generator, steps: int = 2000
) -> Float[Tensor, "n d_model"]:
    """Random unit rows, pushed apart until no two have |cos| above `max_cosine`.

    Raises:
        ValueError: if they still have after `steps` pushes; the Welch bound says what is possible.
    """
    rows = F.normalize(torch.randn(n, d_model, generator=generator, dtype=torch.float64), dim=-1)
    for _ in range(steps):
        cosines = rows @ rows.T
        cosines.fill_diagonal_(0.0)
        if cosines.abs().max() <= max_cosine:
            return rows.float()
        excess = torch.sign(cosines) * (cosines.abs() - 0.98 * max_cosine).clamp_min(0.0)
        rows = F.normalize(rows - 0.5 * excess @ rows, dim=-1)
    welch = max(0.0, (n - d_model) / (d_model * (n - 1))) ** 0.5
    raise ValueError(
        f"`max_cosine`={max_cosine} was not reached by {n} rows in {d_model} dimensions after {steps} steps"
        f" (no set goes below {welch:.3f}); raise it or lower `n`."
    )


@torch.no_grad()
def geometry_of(
    directions: Float[Tensor, "n d_model"],
    firings: Num[Tensor, " _"] | None = None,
    cofirings: Iterable[SparseLatents] | None = None,
) -> Geometry:
    """The numbers of `Geometry`, from one pass over blocks of pairs: memory never grows with n².

    Args:
        directions: Rows of any length but zero; for a null, `random_rows` of the same shape.
        firings: How often each fires, or the sum of its magnitudes; None = no `effective_size`.
        cofirings: Codes on these directions, batch by batch; None = none.

    References:
        "The effective rank: a measure of effective dimensionality", Roy and Vetterli 2007. "Finite normalized
        tight frames", Benedetto and Fickus 2003 (the frame potential).
    """
    unit = unit_rows(directions)
    n, d = unit.shape
    nearest, antipodal = unit.new_zeros(n), 0
    for rows, columns, cosines in _tiles(unit):
        close = int((cosines < ANTIPODAL).sum())
        antipodal += close // 2 if rows == columns else close
        cosines.abs_()
        nearest[rows] = nearest[rows].maximum(cosines.amax(1))
        nearest[columns] = nearest[columns].maximum(cosines.amax(0))
    nearest = nearest.clamp_max(1.0).double().cpu()
    spectrum = _squared_singular_values(unit)
    potential = float(spectrum.square().sum())
    return Geometry(
        n=n,
        d_model=d,
        nearest=_quantiles(nearest),
        nearest_mean=float(nearest.mean()),
        coherence=float(nearest.max()),
        welch=welch_bound(n, d),
        mean_square=max(0.0, potential - n) / (n * (n - 1)) if n > 1 else 0.0,
        frame_potential=potential / max(n, n * n / d),
        effective_rank=_exp_entropy(spectrum.sqrt()),
        participation_ratio=n * n / potential,
        antipodal_pairs=antipodal,
        effective_size=None if firings is None else _effective_size(firings, n),
        cofirings=None if cofirings is None else cofiring_coherence(directions, cofirings),
    )


def unit_rows(directions: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
    """The rows divided by their lengths, in float32 or more.

    Raises:
        InputError: if there is none, or one that has no direction.
    """
    rows = directions.detach().to(torch.promote_types(directions.dtype, torch.float32))
    norms = rows.norm(dim=1)
    bad = int((~(norms.isfinite() & (norms > 0))).sum())
    if len(rows) == 0 or bad:
        raise InputError(
            f"`directions` must be finite rows other than zero, got {bad} bad ones of {len(rows)}; leave them"
            " out."
        )
    return rows / norms[:, None]


def random_rows(n: int, d_model: int, generator: torch.Generator) -> Float[Tensor, "n d_model"]:
    """Unit rows, uniform on the sphere: what any geometry is to be held against."""
    return F.normalize(torch.randn(n, d_model, generator=generator), dim=-1)


def nearest_neighbour_null(
    n: int, d_model: int, quantiles: Sequence[float] = QUANTILES
) -> Float64[Tensor, " quantiles"]:
    """Quantiles of the largest |cos| of one of n random directions with the n - 1 others, exactly.

    These |cos| are independent with P(|cos| > t) = I_{1 - t²}((d_model - 1) / 2, 1 / 2), so the largest is at
    most t with probability (1 - P)^{n - 1}.
    """
    if n < 2 or d_model < 2:
        raise InputError(f"`n` and `d_model` must be at least 2, got n={n} and d_model={d_model}.")
    if not all(0 < q < 1 for q in quantiles):
        raise InputError(f"`quantiles` must be in (0, 1), got {tuple(quantiles)}.")
    tails = [-math.expm1(math.log(q) / (n - 1)) for q in quantiles]
    squares = special.betainccinv(0.5, (d_model - 1) / 2, tails)
    return torch.as_tensor(squares, dtype=torch.float64).sqrt()


def cofiring_coherence(directions: Float[Tensor, "n d_model"], codes: Iterable[SparseLatents]) -> Cofirings:
    """`CofiringCoherence` of all these codes."""
    measured = CofiringCoherence(directions)
    for code in codes:
        measured.add(code)
    return measured.compute()


class CofiringCoherence:
    """Accumulates `Cofirings` batch by batch: l0² d_model products a row, and never all pairs of latents.

    A pair of latents weighs as much as the number of rows on which both fire.
    """

    def __init__(self, directions: Float[Tensor, "n d_model"]) -> None:
        self._unit = unit_rows(directions)
        self._sums = self._unit.new_zeros(3, dtype=torch.float64)
        self._pairs = 0

    @torch.no_grad()
    def add(self, code: SparseLatents) -> None:
        """Adds the rows of a code; entries equal to zero do not count as firing."""
        code.check(len(self._unit))
        code = code.to(self._unit.device).without_zeros()
        counts, order = code.row_offsets.diff().sort(descending=True, stable=True)
        order = order[counts > 1]
        self._pairs += int((counts * (counts - 1)).sum()) // 2
        begin = 0
        while begin < len(order):
            longest = int(counts[begin])
            end = begin + max(1, _BUDGET // (longest * max(longest, self._unit.shape[1])))
            self._add_rows(code, order[begin:end], longest)
            begin = end

    def _add_rows(self, code: SparseLatents, rows: Tensor, longest: int) -> None:
        """Rows of 2 to `longest` entries: their directions, and their Gram matrices by blocks of columns."""
        slots = torch.arange(longest, device=rows.device)
        begins = code.row_offsets[rows, None]
        filled = slots < code.row_offsets[rows + 1, None] - begins
        places = torch.where(filled, begins + slots, begins)
        signs = code.values[places].sign().to(self._unit) * filled
        chosen = self._unit[code.indices[places]] * signs[:, :, None]
        for some in slots.split(max(1, _BUDGET // (len(rows) * longest))):
            cosines = chosen @ chosen[:, some].transpose(1, 2)
            cosines[:, some, some - some[0]] = 0.0
            sums = cosines.square().sum(dtype=torch.float64), cosines.sum(dtype=torch.float64)
            self._sums += torch.stack([sums[0], cosines.abs_().sum(dtype=torch.float64), sums[1]])

    def compute(self) -> Cofirings:
        """Of everything added so far."""
        if self._pairs == 0:
            return Cofirings(0, None, None, None)
        return Cofirings(self._pairs, *(self._sums / (2 * self._pairs)).tolist())


def _tiles(unit: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Rows, columns and their cosines in blocks on and above the diagonal, which itself is 0."""
    for i in range(0, len(unit), _TILE):
        for j in range(i, len(unit), _TILE):
            cosines = unit[i : i + _TILE] @ unit[j : j + _TILE].T
            if i == j:
                cosines.fill_diagonal_(0.0)
            yield slice(i, i + _TILE), slice(j, j + _TILE), cosines


def _squared_singular_values(unit: Tensor) -> Float64[Tensor, " d_model"]:
    """Eigenvalues of the d x d matrix of second moments, summed in float64; what is rounding is cut off."""
    gram = unit.new_zeros(unit.shape[1], unit.shape[1], dtype=torch.float64)
    for rows in unit.split(_TILE):
        exact = F.normalize(rows.double(), dim=1)
        gram += exact.T @ exact
    values = torch.linalg.eigvalsh(gram.cpu())
    return values.where(values > values.max() * len(values) * torch.finfo(values.dtype).eps, 0.0)


def _quantiles(values: Tensor) -> Float64[Tensor, " quantiles"]:
    """`QUANTILES`, linear between neighbours; unlike torch.quantile for any number of values."""
    place = torch.tensor(QUANTILES, dtype=torch.float64) * (len(values) - 1)
    ordered = values.sort().values
    return torch.lerp(ordered[place.floor().long()], ordered[place.ceil().long()], place.frac())


def _exp_entropy(mass: Tensor) -> float:
    return float(torch.special.entr(mass / mass.sum()).sum().exp())


def _effective_size(firings: Tensor, n: int) -> float:
    mass = firings.detach().double()
    if len(mass) != n:
        raise InputError(f"`firings` must have one number for each of the {n} directions, got {len(mass)}.")
    if not (bool((mass >= 0).all()) and 0 < float(mass.sum()) < math.inf):
        raise InputError(
            "`firings` must be finite, none negative and not all zero, got values from"
            f" {float(mass.min()):g} to {float(mass.max()):g}."
        )
    return _exp_entropy(mass)
