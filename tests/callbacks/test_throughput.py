"""tokens_per_s: after the warm-up, data wait included, validation excluded."""

from types import SimpleNamespace
from unittest import mock

import lightning
import pytest
import torch

from sae.callbacks import throughput
from sae.callbacks.throughput import WARMUP_STEPS, Throughput


def test_rate_counts_steps_and_waits_but_not_warm_up_or_validation(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: clock.now)
    trainer, module = mock.MagicMock(spec=lightning.Trainer), mock.MagicMock(spec=lightning.LightningModule)
    trainer.datamodule, trainer.global_step, trainer.log_every_n_steps = (
        SimpleNamespace(batch_size=100),
        1,
        10**9,
    )
    module.device = torch.device("cpu")
    callback = Throughput()
    for i in range(WARMUP_STEPS + 10):
        clock.now += 50.0 if i < WARMUP_STEPS else 2.0
        callback.on_train_batch_end(trainer, module, None, None, i)
        if i == WARMUP_STEPS + 3:
            callback.on_validation_start(trainer, module)
            clock.now += 1000.0
            callback.on_validation_end(trainer, module)
    callback.on_train_end(trainer, module)
    assert callback.tokens_per_s == pytest.approx(10 * 100 / 20.0)
