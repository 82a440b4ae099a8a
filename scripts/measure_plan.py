"""Sets the planned memory of a configuration's training step beside that of a few real steps.

    python scripts/measure_plan.py --config quickstart.yaml
    python scripts/measure_plan.py --config quickstart.yaml --trainer.precision bf16-mixed

The steps run on random rows of the right width, so neither text nor cache is needed, on one device, with
every latent counted as dead: the plan's worst case. Measured is, on a GPU, torch.cuda.max_memory_allocated;
on a CPU the highest sum of all blocks that torch's allocator had given out and not got back, from the
profiler's record of every one (the memory of the process would count pages that nobody uses any more).
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import lightning
import torch
from torch import Tensor

from sae.benchmarks.peak import peak_bytes
from sae.cli import SaeCLI
from sae.exits import exit_on_input_error
from sae.files import format_bytes
from sae.ops.moments import Moments
from sae.planning import Step, memory_of, plan_run
from sae.training import SparseAutoencoderModule

STEPS = 3  # gradients and moments are all there from the second on


class Batch(NamedTuple):
    """Rows as a cache gives them."""

    x: Tensor
    position: Tensor | None


class RandomRows(lightning.LightningDataModule):
    """What the module needs of a datamodule, with random rows of unit variance."""

    def __init__(self, step: Step, dtype: torch.dtype) -> None:
        super().__init__()
        self.step, self.dtype = step, dtype
        self.batch_size, self.d_model = step.rows, step.d_model
        mean = torch.zeros(step.d_model, dtype=torch.float64)
        # The trace alone is read; a matrix of its own would count as memory of the step.
        self.moments = Moments(1, mean, torch.ones((), dtype=torch.float64).expand(1, 1) * step.d_model)

    def train_dataloader(self) -> Batches:
        """A few batches."""
        return Batches(STEPS, self.step.rows, self.step.d_model, self.dtype)

    def first_rows(self, n: int) -> Tensor:
        """As many as a batch has."""
        return torch.randn(self.step.rows, self.step.d_model)

    def val_dataloader(self) -> Batches:
        """One batch, of the size that every GPU takes."""
        return Batches(1, self.step.held_out_rows, self.step.d_model, self.dtype)


class Batches:
    """So many random batches, each made when asked for."""

    def __init__(self, n: int, rows: int, d_model: int, dtype: torch.dtype) -> None:
        self._n, self._shape, self._dtype = n, (rows, d_model), dtype

    def __len__(self) -> int:
        return self._n

    def __iter__(self) -> Iterator[Batch]:
        for _ in range(self._n):
            x = torch.empty(self._shape, dtype=self._dtype).normal_()
            yield Batch(x, torch.arange(len(x), dtype=torch.int32) % 128)


class AllDead(lightning.Callback):
    """Every latent counts as dead from the first step on."""

    def on_fit_start(self, trainer: lightning.Trainer, pl_module: SparseAutoencoderModule) -> None:
        """Before the list of dead latents is first asked for."""
        for learner in pl_module.each.values():
            learner.dead_latents.dead.fill_(True)


def measure(module: SparseAutoencoderModule, step: Step, dtype: torch.dtype, **trainer: Any) -> int:
    """Bytes at the peak of a few steps and a validation.

    Args:
        module: not used before.
        step: gives rows and width.
        dtype: of the rows.
        trainer: arguments of the Trainer, e.g. `accelerator`, `precision`.
    """
    runner = lightning.Trainer(
        max_steps=STEPS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        val_check_interval=STEPS,
        log_every_n_steps=1,
        devices=1,
        callbacks=[AllDead()] if step.revived else [],
        **{"gradient_clip_val": 1.0, **trainer},
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning would have more workers than none
        fit = lambda: runner.fit(module, datamodule=RandomRows(step, dtype))  # noqa: E731
        return peak_bytes(fit, runner.strategy.root_device)


def main() -> None:
    """Plans, runs, prints both."""
    cli = SaeCLI(sys.argv[1:])
    plan = plan_run(cli.model, cli.datamodule, cli.trainer)
    step = replace(plan.step, nmf=False)
    planned = memory_of(*(replace(each, nmf=False) for each in plan.each))
    device = "gpu" if cli.trainer.strategy.root_device.type == "cuda" else "cpu"
    measured = measure(
        cli.model,
        step,
        plan.cache.row_dtype,
        accelerator=device,
        precision=step.precision,
        gradient_clip_val=cli.trainer.gradient_clip_val,
    )
    kinds = ", ".join(f"{type(d).__name__}({d.extra_repr()})" for d in plan.dictionaries.values())
    print(f"{kinds}, {step.rows:,} rows, {step.precision}")
    print(f"planned  {format_bytes(planned.total)} at the peak, {planned.peak_at}")
    print(f"measured {format_bytes(measured)} on {cli.trainer.strategy.root_device.type}")
    print(f"planned / measured - 1 = {planned.total / measured - 1:+.1%}")


if __name__ == "__main__":
    exit_on_input_error(main)
