"""Adam that leaves the rows of latents alone that had no part in a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim.adam import adam

from sae.errors import InputError
from sae.ops.kernels import kernel


class RowSparseAdam(torch.optim.Adam):
    """Adam on the rows of each parameter whose gradient is not zero; all others keep weights and moments.

    A latent that fires on no row of a batch has a gradient of zeros. Adam moves its weights all the same, by
    what is left of its momentum, and that takes 28 bytes of traffic for each of its numbers. Here it takes
    a reading of its gradient, which pays where few latents fire: n_latents well above rows * k. It is a
    different optimiser, though: moments fade with the steps in which a latent takes part, not with all. Where
    every row has a gradient, a step is Adam's. `step`, which corrects the moments' bias, counts all steps.

    On a CPU it is one pass in place. Elsewhere rows are taken out and put back, and finding them waits for
    the device, once a parameter. Without weight decay.

    References:
        The rule is that of `torch.optim.SparseAdam`, which wants sparse gradients.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        fused: bool = True,
    ) -> None:
        """Takes parameters, or groups of them, as torch's; it is always fused.

        Raises:
            InputError: for `fused=False`.
        """
        if not fused:
            raise InputError("`fused` must be True: there is no other row-sparse Adam.")
        super().__init__(params, lr=lr, betas=betas, eps=eps, fused=True)
        self._step_supports_amp_scaling = False  # a gradient scaler is to undo its scale before the step

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step; `found_inf`, where it is set and above 0, keeps the optimiser from it."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step(parameter, parameter.grad, group)
        return loss

    def _step(self, parameter: Tensor, gradient: Tensor, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        moments = [state["exp_avg"], state["exp_avg_sq"]]
        found_inf = getattr(self, "found_inf", None)
        apt = parameter.ndim > 0 and all(tensor.is_contiguous() for tensor in (parameter, *moments))
        in_place = kernel("adam_rows", parameter) if apt else None
        if in_place is None:
            _step_on_rows_taken_out(parameter, gradient, moments, state["step"], group, found_inf)
        elif found_inf is None or not found_inf > 0:
            state["step"] += 1
            whole = [tensor.view(len(tensor), -1) for tensor in (parameter, gradient.contiguous(), *moments)]
            in_place(*whole, float(state["step"]), float(group["lr"]), group["betas"], group["eps"])


def _step_on_rows_taken_out(
    parameter: Tensor,
    gradient: Tensor,
    moments: list[Tensor],
    step: Tensor,
    group: dict[str, Any],
    found_inf: Tensor | None,
) -> None:
    """By torch's fused Adam, on copies of the rows."""
    whole = [parameter, gradient, *moments]
    rows = _rows_of(gradient) if gradient.ndim else gradient.new_zeros(0)
    some = (
        whole
        if gradient.ndim == 0 or len(rows) == len(parameter)
        else [tensor.index_select(0, rows) for tensor in whole]
    )
    beta1, beta2 = group["betas"]
    adam(
        *([tensor] for tensor in some), [], [step],
        fused=True, amsgrad=False, beta1=beta1, beta2=beta2, lr=group["lr"],
        weight_decay=0.0, eps=group["eps"], maximize=False, found_inf=found_inf,
    )  # fmt: skip
    if some is not whole:
        for tensor, changed in zip((whole[0], *whole[2:]), (some[0], *some[2:]), strict=True):
            tensor.index_copy_(0, rows, changed)


def _rows_of(gradient: Tensor) -> Tensor:
    """Those that are not all zeros."""
    taking_part = gradient != 0 if gradient.ndim == 1 else (gradient.amax(1) != 0) | (gradient.amin(1) != 0)
    return taking_part.nonzero().squeeze(1)
