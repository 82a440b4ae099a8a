"""How long things take at assumed rates: floating-point operations, and bytes between GPUs."""

from __future__ import annotations

import time
from typing import NamedTuple

import torch

TERA = 1e12
PEAKS = {  # dense, without sparsity, in TFLOP/s, from the data sheets: bfloat16, float32, float64
    "A100": (312, 19.5, 9.7),
    "L40S": (362, 91.6, 1.4),
    "H100": (989, 67, 34),
    "H200": (989, 67, 34),
}
SHARES = (0.1, 0.4)
"""Of the peak that is assumed to be reached, at worst and at best."""
LINKS = {"NVLink": 300e9, "PCIe": 20e9}
"""Bytes a second that a GPU is assumed to send around a ring."""
LAUNCHING = (0.001, 0.004)
"""Seconds that a step takes on a GPU however small it is, at best and at worst: some hundred launches."""
_SIZE, _MEASURED_S = 512, 0.2


class Span(NamedTuple):
    """Seconds, at best and at worst."""

    best: float
    worst: float

    def __str__(self) -> str:
        if self.worst < 60:
            return "under a minute"
        return f"{format_seconds(self.best)} to {format_seconds(self.worst)}"


class Work(NamedTuple):
    """Floating-point operations of a run, over all GPUs."""

    harvest: float
    harvest_dtype: torch.dtype
    """That the language model computes in."""
    train: float
    """Without AuxK."""
    auxk: float
    """What AuxK adds with dead latents in every step."""
    train_dtype: torch.dtype
    """Of the encoder's product."""
    batches: int
    """Passes forward and back, one or several to a step."""


def spans(work: Work, gpus: int, measure: bool) -> dict[str, tuple[Span | None, Span]]:
    """For each kind of device, how long harvest (None = nothing to do) and training take on `gpus` of it.

    Args:
        work: what is to be done.
        gpus: that share it equally.
        measure: also this machine's processor, by a short product of matrices.
    """
    found = {}
    for name in PEAKS:
        rates = [peak_flops(name, dtype) * gpus for dtype in (work.harvest_dtype, work.train_dtype)]
        found[name] = _spans(work, rates[0], rates[1], SHARES, LAUNCHING)
    if measure:
        rate = measured_flops(work.train_dtype)
        # Of a bare product's rate a processor reaches more than a GPU does: its memory is less far behind.
        found["this processor"] = _spans(work, rate, rate, (0.3, 0.8), (0.0, 0.0))
    return found


def _spans(
    work: Work,
    harvest_rate: float,
    train_rate: float,
    shares: tuple[float, float],
    launching: tuple[float, float],
) -> tuple[Span | None, Span]:
    low, high = shares
    train = Span(
        work.train / train_rate / high + launching[0] * work.batches,
        (work.train + work.auxk) / train_rate / low + launching[1] * work.batches,
    )
    if not work.harvest:
        return None, train
    return Span(work.harvest / harvest_rate / high, work.harvest / harvest_rate / low), train


def peak_flops(gpu: str, dtype: torch.dtype) -> float:
    """Operations a second of a GPU in `PEAKS`, in half, single or double precision."""
    return PEAKS[gpu][{torch.float32: 1, torch.float64: 2}.get(dtype, 0)] * TERA


def measured_flops(dtype: torch.dtype) -> float:
    """Operations a second of this machine's processor on a product of matrices; takes a fifth of a second."""
    a = torch.ones(_SIZE, _SIZE, dtype=dtype)
    torch.mm(a, a)
    begin, done = time.perf_counter(), 0
    while (passed := time.perf_counter() - begin) < _MEASURED_S:
        torch.mm(a, a)
        done += 1
    return 2 * _SIZE**3 * done / passed


def ring_bytes(gradient_bytes: int, gpus: int) -> int:
    """Bytes that each GPU sends per step to sum the gradients around a ring: 2 (g - 1) / g of them."""
    return 2 * (gpus - 1) * gradient_bytes // gpus


def format_seconds(seconds: float) -> str:
    """One or two digits are all that a plan knows: `3 ms`, `40 s`, `5 min`, `2.5 h`, `3 days`."""
    for limit, unit, size in ((1, "ms", 1e-3), (90, "s", 1), (5400, "min", 60), (172_800, "h", 3600)):
        if seconds < limit:
            return f"{_rough(seconds / size)} {unit}"
    return f"{_rough(seconds / 86_400)} days"


def _rough(value: float) -> str:
    """Two digits: 0.013, 1.3, 13, 130."""
    return f"{float(f'{value:.2g}'):g}"
