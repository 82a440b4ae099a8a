"""tokens_per_s: after the warm-up, data wait included, validation excluded."""

from types import SimpleNamespace
from unittest import mock

import lightning
import pytest
import torch

from sae.callbacks import throughput
from sae.callbacks.throughput import WARMUP_STEPS, Throughput
from sae.training import SparseAutoencoderModule


def test_rate_counts_steps_and_waits_but_not_warm_up_or_validation(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(throughput.time, "perf_counter", lambda: clock.now)
    trainer, module = mock.MagicMock(spec=lightning.Trainer), mock.MagicMock(spec=SparseAutoencoderModule)
    trainer.datamodule = SimpleNamespace(batch_size=100, waited_s=0.0)
    trainer.global_step, trainer.log_every_n_steps, trainer.accumulate_grad_batches = 1, 10**9, 2
    module.device = torch.device("cpu")
    callback = Throughput()
    for i in range(WARMUP_STEPS + 10):
        clock.now += 50.0 if i < WARMUP_STEPS else 2.0
        trainer.datamodule.waited_s += 40.0 if i < WARMUP_STEPS else 0.5
        callback.on_train_batch_end(trainer, module, None, None, i)
        if i == WARMUP_STEPS + 3:
            callback.on_validation_start(trainer, module)
            clock.now += 1000.0
            callback.on_validation_end(trainer, module)
    callback.on_train_end(trainer, module)
    assert callback.tokens_per_s == pytest.approx(10 * 100 / 20.0)
    assert callback.steps_per_s == pytest.approx(10 / 2 / 20.0) and callback.data_wait == pytest.approx(0.25)
