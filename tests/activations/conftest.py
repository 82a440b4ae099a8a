"""Arrays to import, and what comes out of the cache again."""

from __future__ import annotations

import shutil

import datasets
import numpy as np
import pytest
import torch

from sae.activations.cache import plan
from sae.activations.exchange.exported import export_activations


@pytest.fixture
def small_shards(monkeypatch):
    """Several shards, so that rows are dealt and mixed."""
    monkeypatch.setattr(plan, "SMALLEST_SHARD_BYTES", 8192)


@pytest.fixture
def x():
    return torch.randn(3000, 6)


@pytest.fixture
def lengths():
    """Of sequences, 3000 rows in all."""
    found = []
    while sum(found) < 3000:
        found.append(min(int(torch.randint(1, 50, ())), 3000 - sum(found)))
    return torch.tensor(found)


@pytest.fixture
def exported(tmp_path):
    """Exports a cache and reads the files: `x`, and `tokens`, `sequence`, `position` where they are."""

    def export(cache, **options):
        out = tmp_path / "exported" / "x.npy"
        shutil.rmtree(out.parent, ignore_errors=True)
        out.parent.mkdir()
        files = export_activations(cache, out, **options)
        assert sorted(out.parent.iterdir()) == sorted(files)  # nothing temporary is left
        return {file.name.split(".")[-2]: np.load(file) for file in files}

    return export


@pytest.fixture
def write_saelens():
    """Writes a folder as SAELens does."""

    def write(path, x, ids, column="blocks.1.hook_resid_post"):
        _, context, d_model = x.shape
        columns = {
            column: datasets.Array2D((context, d_model), str(x.dtype).removeprefix("torch.")),
            "token_ids": datasets.Sequence(datasets.Value("int32"), length=context),
        }
        data = {column: x.numpy(), "token_ids": ids.numpy().astype(np.int32)}
        made = datasets.Dataset.from_dict(data, features=datasets.Features(columns))
        made.save_to_disk(str(path), num_shards=3)
        return path

    return write
