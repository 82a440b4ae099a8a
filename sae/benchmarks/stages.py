"""Which part of a step's time goes where, by the operations that the profiler saw."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile

STAGES = {
    "encoder": ("addmm", "aten::mm", "linear", "gemm", "cutlass", "nvjet"),
    "selection": (
        "topk",
        "amax",
        "aten::max",
        "gather",
        "nonzero",
        "aten::gt",
        "aten::sort",
        "index",
        "sae::largest",
    ),
    "decode, weight gradients": ("embedding_bag", "sum_rows", "argsort", "radix", "sort", "by_latent"),
    "latent gradients": ("per_sample_weights_backward", "products"),
    "optimiser": ("adam",),
}
"""Operations by parts of their names; what matches several counts for the last of them."""


def shares(step: Callable[[], object], device: str, steps: int = 5) -> dict[str, float]:
    """Share of the time of some steps for each stage; `rest` is all else."""
    on_gpu = device.startswith("cuda")
    step()
    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if on_gpu else [])
    with profile(activities=activities) as record:
        for _ in range(steps):
            step()
        if on_gpu:
            torch.cuda.synchronize()
    spent = dict.fromkeys([*STAGES, "rest"], 0.0)
    for event in record.key_averages():
        time = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        name = event.key.lower()
        found = [stage for stage, words in STAGES.items() if any(word.lower() in name for word in words)]
        spent[found[-1] if found else "rest"] += time
    total = sum(spent.values()) or 1.0
    return {stage: time / total for stage, time in spent.items()}
