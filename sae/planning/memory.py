"""The bytes that a training step holds at its peak, counted tensor by tensor.

A count, and not a measurement extrapolated: the peak is the largest of a few moments of the step, each of
which grows with the rows in its own way, so a small run may peak elsewhere than a large one, and a run of
full size is what one wants to know about before paying for it. The lists below name what is alive at each
moment, and `scripts/measure_plan.py` shows how near they come to a run; the tests hold them to 10 %.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from sae.ops import encoder, slots
from sae.ops.kernels import kernel
from sae.ops.largest import GROUP

INDEX = 8  # bytes of an int64
DOUBLE = 8  # bytes of a float64
NMF_START_ROWS = 10_000
"""Rows that the NMF baseline starts from, in float64."""
_ELEMENT = {"32-true": 4, "bf16-mixed": 4, "64-true": 8}


class Memory(NamedTuple):
    """Bytes on one GPU at the peak of a run."""

    parameters: int
    """The weights and buffers of all dictionaries, running means, and the counters of dead latents."""
    gradients: int
    moments: int
    """Adam's two."""
    activations: int
    """Everything else at the peak: the batch, what the step makes of it, and copies the size of a weight."""
    peak_at: str
    """When it is reached, in words."""

    @property
    def total(self) -> int:
        """Sum of the parts, bytes."""
        return self.parameters + self.gradients + self.moments + self.activations


@dataclass(frozen=True)
class Step:
    """All that the memory of a step depends on, for one dictionary."""

    rows: int
    """Rows of a batch on one GPU."""
    held_out_rows: int
    """Rows of a batch in validation on one GPU."""
    d_model: int
    n_latents: int
    entries: int
    """Latents that the kind selects per row, when these are most."""
    revived: int
    """Dead latents that AuxK selects per row; 0 = without AuxK."""
    weights: int
    """Numbers in all parameters."""
    largest: int
    """Numbers in the largest parameter."""
    buffers: int
    """Numbers in all buffers."""
    precision: str
    """Of the Trainer."""
    row_element: int
    """Bytes of a number of a row as the loader gives it."""
    holds_gradients: bool
    """Whether gradients stay in memory during the backward pass (DDP's buckets, accumulated batches)."""
    shares: int = 0
    """Numbers that ride on the gradients from GPU to GPU (on one GPU they are there as well)."""
    penalised: bool = False
    """Whether the kind has a penalty, which keeps a few numbers of every entry."""
    pursues: bool = False
    """Whether the kind has no encoder and finds its code by a pursuit."""
    chooses_in_rows: bool = False
    """Whether the kind takes the largest of each row, as AuxK does."""
    levels: int = 1
    """Prefixes of the dictionary that reconstruct by themselves."""
    row_sparse: bool = False
    """Whether Adam takes out the rows of latents that had a part in the step."""
    averages: bool = False
    """Whether a running mean of the weights is kept."""
    on_processor: bool = False
    """Whether it trains on a CPU, where blocks of the encoder's product are smaller, and made by oneDNN."""
    nmf: bool = False
    """Whether an NMF baseline is fitted before the training, with d_model components."""

    @property
    def element(self) -> int:
        """Bytes of a number of the weights."""
        return _ELEMENT[self.precision]

    @property
    def pre_act(self) -> int:
        """Bytes of a pre-activation."""
        return 2 if self.precision == "bf16-mixed" else self.element


def memory_of(*steps: Step) -> Memory:
    """The peak of a run: the largest of what its moments hold.

    Several dictionaries learn from one backward pass over the sum of their losses. It goes through them from
    the last to the first, so what the forward pass has kept of all of them is there at once; what a single
    one needs for a moment adds to that.
    """
    weights = [step.weights * step.element for step in steps]
    of_each = [own + step.shares * step.element for own, step in zip(weights, steps, strict=True)]
    gradients, moments = sum(of_each), 2 * sum(weights)
    parameters = sum(of_each) + sum(
        step.buffers * step.element + _counters(step) + _averages(step) for step in steps
    )
    # Gradients that are there while one dictionary is passed back: of those after it, in buckets of all.
    others = [
        gradients - own if step.holds_gradients else sum(of_each[i + 1 :])
        for i, (own, step) in enumerate(zip(of_each, steps, strict=True))
    ]
    kept = [sum(map(_kept, steps[:i])) for i in range(len(steps))]
    peaks = {
        "the forward pass": _most(lambda i: kept[i] + _forward(steps[i]), steps) + gradients,
        "the backward pass": _most(lambda i: kept[i] + _backward(steps[i]) + others[i], steps),
        "the optimiser's step": _given(steps[0]) + max(map(_optimiser, steps)) + gradients,
        # Where means are scored, the weights are put aside for as long.
        "validation": max(map(_validation, steps)) + sum(map(_averages, steps)) + gradients,
    }
    if steps[0].nmf:  # fitted before the first step: neither gradients nor moments yet
        peaks["the fit of the NMF baseline"] = _nmf_fit(steps[0]) - moments
    peak_at = max(peaks, key=lambda name: peaks[name])
    # The fit may peak below what gradients and moments take later, or a step without all gradients.
    activations = max(0, peaks[peak_at] - gradients)
    return Memory(parameters, gradients, moments, activations, peak_at)


def _most(held: Callable[[int], int], steps: Sequence[Step]) -> int:
    """The most that is held at any of the dictionaries."""
    return max(map(held, range(len(steps))))


def _counters(step: Step) -> int:
    """Tokens since each latent fired, the dead ones, and whether dead."""
    return step.n_latents * (2 * INDEX + 1)


def _averages(step: Step) -> int:
    """Running means of all weights."""
    return step.weights * step.element if step.averages else 0


def _kept(step: Step) -> int:
    """What the backward pass needs of a dictionary, beside the batch as given."""
    row = step.rows * step.d_model * step.element
    auxk = row + _code(step, step.revived) if step.revived else 0
    return (1 + step.levels) * row + _code(step, step.entries) + auxk


def _code(step: Step, entries: int) -> int:
    """A code with its entries by latent, and their rows: the gradients of both weights want them."""
    return step.rows * entries * (step.element + 3 * INDEX) + step.n_latents * INDEX


def _block(step: Step, rows: int, entries: int, in_rows: bool) -> int:
    """Pre-activations of as many rows as are held at once, and what choosing takes; the weights for them.

    On a processor oneDNN has the weights in an order of its own; autocast makes copies in half precision.
    """
    device = torch.device("cpu" if step.on_processor else "cuda")
    if step.pursues:  # correlations, and what changes them; the matrix of the directions' products
        gram = step.n_latents**2 if slots.gram_pays(step.n_latents, rows, entries) else 0
        return (
            2 * min(rows, slots.rows_at_once(step.n_latents, device)) * step.n_latents + gram
        ) * step.element
    at_once = min(rows, encoder.rows_at_once(step.n_latents, device))
    # Of each row marks of all latents; or the groups of columns that its largest are in, and their places.
    # The kernel that takes the largest of rows has next to nothing.
    choosing = step.n_latents
    if in_rows and step.on_processor and step.pre_act == 4 and kernel("largest", torch.empty(0)):
        choosing = 0
    elif 2 * GROUP * entries <= step.n_latents:
        choosing = max(choosing, entries * (GROUP * (step.pre_act + 1) + 4 * INDEX))
    weights = 0
    if step.pre_act < step.element:
        weights = (step.largest + rows * step.d_model) * step.pre_act
    elif step.on_processor and step.element == 4:
        weights = _matrix(step)
    return at_once * (step.n_latents * step.pre_act + choosing) + weights


def _given(step: Step) -> int:
    """The batch as given."""
    return step.rows * step.d_model * step.row_element


def _matrix(step: Step) -> int:
    """A temporary as large as the largest weight."""
    return step.largest * step.element


def _optimiser(step: Step) -> int:
    """A temporary as large as the largest weight; or weight, gradient and moments of the rows taken out.

    On a processor, in float32, the kernel takes out none.
    """
    taking_part = min(1.0, step.rows * (step.entries + step.revived) / step.n_latents)
    in_place = step.on_processor and step.element == 4 and kernel("adam_rows", torch.empty(0))
    return int(_matrix(step) * (4 * taking_part if step.row_sparse and not in_place else 1))


def _batch(step: Step) -> int:
    """The batch as given, and normalised."""
    return step.rows * step.d_model * (step.row_element + step.element)


def _forward(step: Step) -> int:
    rows = step.rows
    row, found = rows * step.d_model * step.element, rows * step.entries * (step.pre_act + INDEX)
    code = _code(step, step.entries)
    if step.penalised:  # of each entry also its distance, step and ramp, what is penalised, what lies between
        code += rows * step.entries * 8 * step.element
    # u_hat and its residual; on logging steps also the rows about their mean, and these squared. Of several
    # levels the parts, what each leaves, and these squared.
    block = _block(step, rows, step.entries, step.chooses_in_rows)
    moments = [block + 2 * found, 2 * found + code, code + 4 * step.levels * row]
    if step.revived:
        found = rows * step.revived * (step.pre_act + INDEX)
        # u_hat and the residual twice (kept, and for AuxK); the dead latents' weights are a copy.
        moments.append(code + 3 * row + _matrix(step) + _block(step, rows, step.revived, True) + found)
        # The revived values found, and named; as kept, and sorted by latent.
        moments.append(code + 3 * row + found + _code(step, step.revived) + _transposing(step, step.revived))
        # Also the revived values rectified, e_hat, what that leaves, and this squared.
        moments.append(code + 6 * row + _code(step, step.revived) + rows * step.revived * step.element)
    return _batch(step) + max(moments)


def _backward(step: Step) -> int:
    """The gradients of both weights, and what is sorted for the second.

    AuxK's part comes first and frees what it kept, but for its gradients of both weights: these wait for
    the reconstruction's.
    """
    row = step.rows * step.d_model * step.element
    kept = _batch(step) + step.levels * row + _code(step, step.entries)
    held = (step.weights + step.shares) * step.element if step.holds_gradients else 0
    moments = [(1 if step.holds_gradients else 2) * _matrix(step) + _transposing(step, step.entries)]
    if step.revived:
        auxk = row + _code(step, step.revived)
        moments = [
            2 * _matrix(step) + auxk + _transposing(step, step.revived),
            3 * _matrix(step) + _transposing(step, step.entries),
        ]
    return kept + held + max(moments)


def _transposing(step: Step, entries: int) -> int:
    """Values in the order of their latents, and for the biases an index of the only row there is."""
    return step.rows * entries * (INDEX + step.element)


def _validation(step: Step) -> int:
    rows, d = step.held_out_rows, step.d_model
    given = rows * d * step.row_element
    cast = rows * d * step.element if step.row_element != step.element else 0
    coding = (
        rows * d * step.element
        + rows * step.entries * (step.pre_act + INDEX)
        + _block(step, rows, step.entries, step.chooses_in_rows)
    )
    # Scores are kept in float64: x, x_hat, both about the mean or normalised, and a product of them.
    scoring = rows * d * (step.element + 6 * DOUBLE) + rows * step.entries * (step.element + INDEX)
    return given + cast + max(coding, scoring)


def _nmf_fit(step: Step) -> int:
    """Singular vectors of the first rows, split into positive and negative parts."""
    width, rows = 2 * step.d_model, NMF_START_ROWS
    components = min(step.d_model, rows)
    decomposing = DOUBLE * (rows * width + 4 * width**2)
    starting = DOUBLE * (rows * width + 3 * rows * components + width**2)
    return rows * width * 4 + max(decomposing, starting)


def revived_per_row(d_model: int, n_latents: int) -> int:
    """Dead latents that AuxK selects per row when all of them are dead."""
    return min(n_latents, max(1, d_model // 2))
