"""Out of local minima of an NMF: two components that say much the same become one, one that holds two, two.

From one start in two, a component ends as the sum of two parts, and another shares its own with a third or
fits noise. Small steps lead no way out: the way there is uphill.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from sae.baselines.nmf_solvers import OnlineLearner
from sae.baselines.sweeps import ROUNDING, learn_until_settled
from sae.ops.group import Group
from sae.ops.nonnegative import nonnegative_codes

# What a split promises over what the merge costs, at which the two are tried. Where no part is missed it is
# about .03; where one is, .7 and more (planted parts, 128 of width 256).
_WORTH_A_TRIAL = 0.5
# A row uses a component whose code is above this share of the component's largest one.
_IN_USE = 0.1
_POWER_STEPS = 10


def leave_local_minima(
    learner: OnlineLearner,
    objective: float,
    rows: Float[Tensor, "rows width"],
    sweep: Callable[[], Iterator[Tensor]],
    pass_rows: int,
    *,
    passes: int,
    tolerance: float,
    group: Group,
) -> OnlineLearner:
    """Splits and merges until nothing promises more, or what was tried last is no better.

    Every trial learns until it settles, and is kept if its objective is lower by more than `tolerance` of
    itself; so the result is never worse than what was given.

    Args:
        learner: Settled, at `objective`; not changed.
        objective: Share of the rows' energy that it leaves.
        rows: Some of the rows, that splits and merges are judged on.
        sweep: Begins one full pass over the mini-batches.
        pass_rows: Rows in it.
        passes: The most passes over all trials.
        tolerance: Of the objective, as in the fit.
        group: Ranks that learn together, each with all of `rows`.

    References:
        "SMEM Algorithm for Mixture Models", Ueda, Nakano, Ghahramani & Hinton, 2000: to split one and merge
        two at once, and to keep it only if it is better. The two measures are ours.
    """
    while passes > 0 and objective >= ROUNDING:
        components = split_and_merged(learner.components, rows)
        group.of_first_(components)  # other machines may round otherwise
        if torch.equal(components, learner.components):
            break
        trial = learner.restarted(components, rows)
        reached = learn_until_settled(trial, sweep, pass_rows, passes=passes, tolerance=tolerance)
        if not reached.objective < objective * (1 - tolerance):
            break
        learner, objective, passes = trial, reached.objective, passes - reached.passes
    return learner


def split_and_merged(
    components: Float[Tensor, "n width"], rows: Float[Tensor, "rows width"]
) -> Float[Tensor, "n width"]:
    """Copy in which the pair that costs least is one component and the one that gains most is two.

    Equal to `components` where that promises too little to be tried.
    """
    components = components.clone()
    if len(components) < 3:
        return components
    gram = components @ components.T
    codes = nonnegative_codes(gram, rows @ components.T, steps=100, tolerance=1e-4)
    codes_codes = codes.T @ codes
    costs = merge_costs(codes_codes, gram)
    first, second = divmod(int(costs.argmin()), len(components))
    gains, steps = split_gains(rows - codes @ components, codes)
    gains[[first, second]] = 0
    split = int(gains.argmax())
    if not gains[split] > _WORTH_A_TRIAL * costs[first, second]:
        return components
    pair = [first, second]
    components[first] = merged(codes_codes[pair][:, pair], components[pair])
    halves = torch.stack([components[split] + steps[split], components[split] - steps[split]])
    components[[second, split]] = halves.clamp(min=0)
    return components


def merge_costs(codes_codes: Float[Tensor, "n n"], gram: Float[Tensor, "n n"]) -> Float[Tensor, "n n"]:
    """Energy that each two components lose as the best single one of any sign; infinite on the diagonal.

    What a pair contributes to the rows, Z H with two columns in Z, has two singular values; one component
    keeps the larger. Their squares are the eigenvalues of the product of ZᵀZ and HHᵀ, two by two.
    """
    use, length = codes_codes.double().diagonal(), gram.double().diagonal()
    together, overlap = codes_codes.double(), gram.double()
    weight = use * length
    trace = weight[:, None] + weight + 2 * together * overlap
    determinant = (use[:, None] * use - together.square()) * (length[:, None] * length - overlap.square())
    smaller = (trace - (trace.square() - 4 * determinant).clamp(min=0).sqrt()) / 2
    return smaller.clamp(min=0).fill_diagonal_(torch.inf).to(gram)


def merged(codes_codes: Float[Tensor, "2 2"], pair: Float[Tensor, "2 width"]) -> Float[Tensor, " width"]:
    """The component that keeps most of what two contribute: a sum of both, no weight below zero."""
    product = codes_codes.double() @ (pair @ pair.T).double()
    if not product.trace() > 0:
        return pair[0]
    weights = torch.linalg.matrix_power(product / product.trace(), 64).sum(dim=1)
    direction = F.normalize((weights / weights.sum()).to(pair) @ pair, dim=0)
    return direction * pair.norm(dim=1).max()


def split_gains(
    left: Float[Tensor, "rows width"], codes: Float[Tensor, "rows n"]
) -> tuple[Float[Tensor, " n"], Float[Tensor, "n width"]]:
    """Of every component, the most energy on one line of what is left of the rows that use it; and the step.

    Rows of two parts that share a component are left with a difference along one line, of either sign: to
    and from the component by the step it becomes two.

    Args:
        left: What the codes leave of the rows.
        codes: Non-negative.
    """
    used = (codes > _IN_USE * codes.amax(dim=0)).to(left)
    lines = torch.randn(codes.shape[1], left.shape[1], generator=torch.Generator().manual_seed(0)).to(left)
    for _ in range(_POWER_STEPS):
        lines = F.normalize(lines, dim=1)
        lines = (used * (left @ lines.T)).T @ left
    gains = lines.norm(dim=1)
    energy = (used * codes.square()).sum(dim=0)
    length = torch.where(energy > 0, gains / energy, 0).sqrt()
    return gains, F.normalize(lines, dim=1) * length[:, None]
