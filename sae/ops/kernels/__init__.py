"""Which kernel serves a tensor: Triton's on a GPU, compiled C on a CPU, and none where torch's own must do.

Both have `sum_rows` and `products` (see `sae.ops.bags`), the CPU's `largest` and `by_latent` too. What they
give is what torch's operations give, to rounding. `SAE_KERNELS=off` in the environment does without.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import _get_current_dispatch_mode

_ON_GPU = (torch.float32, torch.bfloat16, torch.float16)
_TORCH = "torch's own operations are used"


def kernel(name: str, matrix: Tensor) -> Callable[..., Any] | None:
    """What does `name` for a matrix of this device and dtype; None = torch's own operations are to.

    That there is none is said once, as a warning, where one could be expected: not of float64 on a CPU.
    """
    if isinstance(matrix, FakeTensor) and matrix.device.type == "cpu":
        return None  # it has no numbers; one that is said to be on a GPU goes where a GPU's would
    module = _module_for(matrix.device.type, matrix.dtype)
    return getattr(module, name, None)


def _module_for(device: str, dtype: torch.dtype) -> ModuleType | None:
    off = os.environ.get("SAE_KERNELS") == "off"
    if off or torch.compiler.is_compiling() or _get_current_dispatch_mode() is not None:
        return None  # who watches torch's operations is shown them
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if device == "cuda" or interpreted:
        if dtype in _ON_GPU:
            return _on_gpu()
        if not interpreted:
            _say_once(f"there is no kernel for {dtype} on a GPU; {_TORCH}")
    elif device == "cpu":
        if dtype == torch.float32:
            return _on_cpu()
        if dtype != torch.float64:
            _say_once(f"there is no kernel for {dtype} on a CPU; {_TORCH}, which are slower than in float32")
    return None


@functools.cache
def _on_gpu() -> ModuleType | None:
    try:
        from sae.ops.kernels import on_gpu
    except ImportError as error:
        _say_once(f"Triton is missing ({error}); {_TORCH}, which are slower")
        return None
    return on_gpu


@functools.cache
def _on_cpu() -> ModuleType | None:
    from sae.ops.kernels import on_cpu
    from sae.ops.kernels.build import NotBuilt

    try:
        on_cpu.library()
    except NotBuilt as error:
        _say_once(f"{error}; {_TORCH}, which are slower")
        return None
    return on_cpu


@functools.cache
def _say_once(what: str) -> None:
    warnings.warn(f"sparse products: {what}.", stacklevel=4)
