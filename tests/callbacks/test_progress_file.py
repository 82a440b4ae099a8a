"""progress.json says where a run stands, and how it ended."""

import json
import os
import signal

import pytest
import torch
from support.laws import write_run

from sae.activations.exchange.imported import import_rows
from sae.callbacks import progress_file
from sae.signals import STOP_SIGNALS, Stopped
from sae.training import SparseAutoencoderModule
from train import main


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(progress_file, "SECONDS_APART", 0.0)
    torch.manual_seed(0)
    cache = import_rows(torch.randn(1500, 8), tmp_path / "cache", held_out=0.1).location
    return write_run(tmp_path, cache, baselines=False, max_steps=30)


def _progress(tmp_path):
    return json.loads((tmp_path / "run" / "progress.json").read_text())


def test_a_finished_run_says_so_with_rates_and_scores(run, tmp_path):
    main(["--config", run])
    progress = _progress(tmp_path)
    assert (progress["state"], progress["step"], progress["max_steps"]) == ("finished", 30, 30)
    assert {"train/fvu", "train/l0", "val/fvu", "test/fvu"} <= set(progress["metrics"])
    assert progress["tokens_per_s"] > 0 and 0 <= progress["data_wait"] <= 1 and progress["memory_bytes"] > 1e7


def _fails():
    raise RuntimeError("no more\nand a traceback")


def _is_signalled():
    os.kill(os.getpid(), signal.SIGTERM)


def test_under_way_stopped_and_failed_are_told_apart(run, tmp_path, monkeypatch):
    real, seen, happens = SparseAutoencoderModule.training_step, [], [_fails, _is_signalled]

    def step(self, batch, batch_idx):
        if self.global_step == 15:
            seen.append(_progress(tmp_path))
            happens.pop(0)()
        return real(self, batch, batch_idx)

    monkeypatch.setattr(SparseAutoencoderModule, "training_step", step)
    with pytest.raises(RuntimeError):
        main(["--config", run])
    assert (seen[0]["state"], seen[0]["step"]) == ("running", 15)
    assert (_progress(tmp_path)["state"], _progress(tmp_path)["why"]) == ("failed", "no more")
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(Stopped):
            main(["--config", run])
    finally:
        signal.signal(signal.SIGTERM, handler)
        STOP_SIGNALS.received, STOP_SIGNALS.steps_are_taken = None, False
    assert _progress(tmp_path)["state"] == "stopped"
    assert "stopped by SIGTERM after step 17; checkpoint saved" in _progress(tmp_path)["why"]
