"""The baselines' sums and codes against the matrix products that they are made of."""

from __future__ import annotations

from typing import Any

import torch

from sae.benchmarks.cases import Case
from sae.benchmarks.timing import in_turn, ratio
from sae.ops.moments import StreamingMoments
from sae.ops.nonnegative import nonnegative_codes

_STEPS = 10
"""Of the least-squares problem for a mini-batch's codes, as NMF's fit takes."""


def baseline_figures(case: Case, rounds: int) -> dict[str, Any]:
    """Time of PCA's statistics over X.T @ X in float64, of NMF's codes over a product for each step.

    NMF has as many components as the rows are wide, and of each row both halves.
    """
    (x,) = case.batches(1)
    exact, square = x.double(), torch.empty(case.d_model, case.d_model, dtype=torch.float64, device=x.device)
    moments = StreamingMoments()

    halves = torch.cat([x.clamp(min=0), (-x).clamp(min=0)], 1)
    components = halves[: case.d_model]
    gram, correlations = components @ components.T, halves @ components.T
    codes = torch.empty_like(correlations)

    def products() -> None:
        for _ in range(_STEPS):
            torch.mm(correlations, gram, out=codes)

    calls = {
        "statistics": lambda: moments.add(x),
        "square": lambda: torch.mm(exact.T, exact, out=square),
        "codes": lambda: nonnegative_codes(gram, correlations, steps=_STEPS, tolerance=0.0),
        "products": products,
    }
    times = in_turn(calls, rounds, case.device)
    shape = f"{case.rows:,} rows of {case.d_model}"
    return {
        f"PCA statistics over X.T @ X in float64, {shape}": ratio(times, "statistics", "square"),
        f"NMF codes over a product for each step, {shape}": ratio(times, "codes", "products"),
    }
