"""How fast a run is and what it takes, the same way for every run: rate, data wait, memory, MFU."""

from __future__ import annotations

import resource
import sys
import time
from typing import Any

import lightning
import torch
from lightning.fabric.utilities.throughput import get_available_flops

from sae.training import SparseAutoencoderModule
from sae.training.flops import training_flops
from sae.training.names import curve

WARMUP_STEPS = 20
"""Steps left out at the start of a process, while caches and allocators fill."""


class Throughput(lightning.Callback):
    """Measures tokens over wall time after the first steps of this process.

    The device is waited for at both ends, and on steps that log; waiting for data counts, validation does
    not. Beside the rate, logging steps log the share of time that the host waited for data, the most memory
    taken (of the GPU where there is one, else of the process), and where the device's peak is known the
    share of it that the operations of the training reach (MFU; without AuxK and Adam, so it is a floor).
    Lightning's ThroughputMonitor gives the peak; it is not used as a whole because it waits for the device
    after every step.
    """

    def __init__(self) -> None:
        self._steps = 0
        self._begin: float | None = None
        self._paused = 0.0
        self._pause_begin = 0.0
        self._waited_before = 0.0
        self._peak_flops: int | None = None
        self.tokens_per_s: float | None = None
        self.steps_per_s: float | None = None
        self.data_wait: float | None = None
        """Share of the time that the host waited for batches."""
        self.memory_bytes: int | None = None

    def on_train_start(self, trainer: lightning.Trainer, pl_module: SparseAutoencoderModule) -> None:
        """Looks up what the device could do."""
        if pl_module.device.type == "cuda":
            dtypes = {"bf16-mixed": torch.bfloat16, "64-true": torch.float64}
            dtype = dtypes.get(str(trainer.precision), torch.float32)
            self._peak_flops = get_available_flops(pl_module.device, dtype)

    def on_train_batch_end(
        self,
        trainer: lightning.Trainer,
        pl_module: SparseAutoencoderModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Starts the clock after the warm-up; reports on logging steps."""
        self._steps += 1
        if self._steps == WARMUP_STEPS:
            self._begin = _now(pl_module)
            self._waited_before = _waited_s(trainer)
        elif self._begin is not None and trainer.global_step % trainer.log_every_n_steps == 0:
            self._update(trainer, pl_module)
            known = {
                "train/tokens_per_s": self.tokens_per_s,
                "train/data_wait": self.data_wait,
                "train/memory_bytes": self.memory_bytes,
                "train/mfu": self._mfu(pl_module),
            }
            for name, value in known.items():
                if value is not None:
                    self.log(name, float(value))

    def on_validation_start(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Stops the clock."""
        self._pause_begin = _now(pl_module)

    def on_validation_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Starts it again."""
        if self._begin is not None:
            self._paused += _now(pl_module) - self._pause_begin

    def on_train_end(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        """Takes the final figure."""
        if self._begin is not None and self._steps > WARMUP_STEPS:
            self._update(trainer, pl_module)

    def _update(self, trainer: lightning.Trainer, pl_module: lightning.LightningModule) -> None:
        assert self._begin is not None
        seconds = _now(pl_module) - self._begin - self._paused
        batches = self._steps - WARMUP_STEPS
        self.memory_bytes = _most_memory(pl_module.device)
        if seconds > 0:
            self.tokens_per_s = batches * trainer.datamodule.batch_size / seconds  # pyright: ignore[reportAttributeAccessIssue]
            self.steps_per_s = batches / trainer.accumulate_grad_batches / seconds
            self.data_wait = (_waited_s(trainer) - self._waited_before) / seconds

    def _mfu(self, pl_module: SparseAutoencoderModule) -> float | None:
        if self._peak_flops is None or self.tokens_per_s is None:
            return None
        known, flops = pl_module.trainer.callback_metrics, 0.0
        for name, dictionary in pl_module.dictionaries.items():
            l0 = float(known.get(curve("train", name, "l0"), 0.0))
            flops += training_flops(dictionary.d_model, dictionary.n_latents, l0)[0]
        return flops * self.tokens_per_s / (self._peak_flops * pl_module.trainer.world_size)


def _now(pl_module: lightning.LightningModule) -> float:
    if pl_module.device.type == "cuda":
        torch.cuda.synchronize(pl_module.device)
    return time.perf_counter()


def _waited_s(trainer: lightning.Trainer) -> float:
    return trainer.datamodule.waited_s  # pyright: ignore[reportAttributeAccessIssue]


def _most_memory(device: torch.device) -> int:
    """Bytes: allocated on the GPU at most, or resident in this process at most."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
