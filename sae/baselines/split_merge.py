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
from sae.baselines.sweeps import ROUNDING, Reached, learn_until_settled
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
    reached: Reached,
    rows: Float[Tensor, "rows width"],
    sweep: Callable[[], Iterator[Tensor]],
    pass_rows: int,
    *,
    passes: int,
    tolerance: float,
    group: Group,
) -> tuple[OnlineLearner, Reached]:
    """Splits and merges until nothing promises more, or what was tried last is no better.

    A trial that finds a part that was missed is better after one pass (planted parts: by 4 %, after three it
    has settled); one that is not is given up. It is kept if, when settled, it has lowered the objective by
    more than `tolerance` of itself for each of its passes: more than they could have without it.

    Args:
        learner: Settled; not changed.
        reached: Where it is.
        rows: Some of the rows, that splits and merges are judged on.
        sweep: Begins one full pass over the mini-batches.
        pass_rows: Rows in it.
        passes: The most passes, those that `learner` has had among them.
        tolerance: Of the objective, as in the fit.
        group: Ranks that learn together, each with all of `rows`.

    Returns:
        The learner of the last trial kept, or the given one, and where it is after how many passes of all.

    References:
        "SMEM Algorithm for Mixture Models", Ueda, Nakano, Ghahramani & Hinton, 2000: to split one and merge
        two at once, and to keep it only if it is better. The two measures are ours.
    """
    taken = reached.passes
    while taken < passes and reached.objective >= ROUNDING:
        components = _agreed(split_and_merged(learner.components, rows), learner.components, group)
        if components is None:
            break
        trial = learner.restarted(components, rows)
        found = learn_until_settled(
            trial,
            sweep,
            pass_rows,
            passes=passes - taken,
            tolerance=tolerance,
            first_below=reached.objective,
        )
        taken += found.passes
        if not (found.settled and found.objective < reached.objective * (1 - tolerance * found.passes)):
            break
        learner, reached = trial, found
    return learner, reached._replace(passes=taken)


def _agreed(proposed: Tensor | None, components: Tensor, group: Group) -> Tensor | None:
    """What the first rank proposes: other machines may round otherwise, and all must do the same."""
    is_any = torch.tensor(float(proposed is not None))
    group.of_first_(is_any)
    if not is_any:
        return None
    agreed = components.clone() if proposed is None else proposed
    group.of_first_(agreed)
    return agreed


def split_and_merged(
    components: Float[Tensor, "n width"], rows: Float[Tensor, "rows width"]
) -> Float[Tensor, "n width"] | None:
    """Copy in which the pair that costs least is one component and the one that gains most is two.

    None where that promises too little to be tried.
    """
    if len(components) < 3:
        return None
    gram = components @ components.T
    codes = nonnegative_codes(gram, rows @ components.T, steps=100, tolerance=1e-4)
    codes_codes = codes.T @ codes
    costs = merge_costs(codes_codes, gram)
    kept, freed = divmod(int(costs.argmin()), len(components))
    use = codes_codes.diagonal()
    if use[kept] < use[freed]:
        kept, freed = freed, kept
    gains, steps = split_gains(rows - codes @ components, codes)
    gains[[freed] if use[freed] == 0 else [kept, freed]] = 0
    split = int(gains.argmax())
    cost = costs[kept, freed].clamp(min=ROUNDING * rows.square().sum())
    if not gains[split] > _WORTH_A_TRIAL * cost:
        return None
    components, pair = components.clone(), [kept, freed]
    components[kept] = merged(codes_codes[pair][:, pair], components[pair])
    halves = torch.stack([components[split] + steps[split], components[split] - steps[split]]).clamp(min=0)
    whole = halves.amax(dim=1, keepdim=True) > 0
    components[[freed, split]] = torch.where(whole, halves, components[split])
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
