"""A rolling cache: the batches and the resume of a whole one, within a bound on the disk."""

import contextlib
import dataclasses
import os
import sys

import pytest
import torch

from sae.activations import ActivationCache, ActivationDataModule
from sae.activations import sampler as sampler_module
from sae.activations.cache import plan as plan_module
from sae.activations.cache.writer import ShardWriter
from sae.activations.contexts import whole_contexts
from sae.errors import InputError

harvest_module = sys.modules["sae.activations.harvest"]
DISK = 1_200_000


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(plan_module, "SMALLEST_SHARD_BYTES", 50_000)
    monkeypatch.setattr(sampler_module, "MOST_SHARDS_MIXED", 2)
    monkeypatch.setattr(harvest_module, "STATISTICS_ROWS", 600)


@pytest.fixture(scope="module")
def plain(tmp_path_factory, tiny_source):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "SMALLEST_SHARD_BYTES", 50_000)
        return _opened(tmp_path_factory.mktemp("plain"), _longer(tiny_source))


def _longer(source):
    return dataclasses.replace(source, n_tokens=15_000)


def _opened(folder, source):
    module = ActivationDataModule(str(folder), source, "resid.1", batch_size=128, shuffle_rows=2048)
    module.prepare_data()
    module.setup()
    return module


def _loader(module):
    torch.manual_seed(5)
    return module.train_dataloader()


def _rolling(folder, source, disk=DISK):
    return _opened(folder, dataclasses.replace(_longer(source), disk=disk))


def _size(folder):
    """Bytes of all files, those being written included; some go while they are counted."""
    total = 0
    for entry in os.scandir(folder):
        with contextlib.suppress(FileNotFoundError):
            total += entry.stat().st_size
    return total


def _batches(loader, count):
    found = []
    while len(found) < count:
        found += [batch.x for _, batch in zip(range(count - len(found)), loader, strict=False)]
    return found


def test_batches_are_those_of_a_whole_cache_within_the_bound(plain, tiny_source, tmp_path):
    module = _rolling(tmp_path, tiny_source)
    whole = _size(plain.location)
    assert module.cache.is_rolling and _size(tmp_path) < DISK < whole
    loader, reference = _loader(module), _loader(plain)
    assert len(loader) == len(reference)
    largest = 0
    for _ in range(2):  # passes
        for ours, theirs in zip(loader, reference, strict=True):
            assert torch.equal(ours.x, theirs.x)
            largest = max(largest, _size(tmp_path))
    module.teardown("fit")
    assert largest <= DISK


@pytest.mark.parametrize("step", [3, 40, 130])
def test_a_training_resumes_at_the_very_next_batch(plain, tiny_source, tmp_path, step):
    expected = _batches(_loader(plain), step + 20)
    module = _rolling(tmp_path, tiny_source)
    loader = _loader(module)
    _batches(loader, step)
    state = loader.state_dict()
    module.teardown("fit")
    again = _rolling(tmp_path, tiny_source)
    resumed = _loader(again)
    resumed.load_state_dict(state)
    for ours, theirs in zip(_batches(resumed, 20), expected[step:], strict=True):
        assert torch.equal(ours, theirs)
    again.teardown("fit")


def test_what_is_at_hand_can_be_read_with_its_tokens(plain, tiny_source, tmp_path):
    module = _rolling(tmp_path, tiny_source)
    loader = _loader(module)
    _batches(loader, 60)
    module.teardown("fit")
    cache = ActivationCache(tmp_path)
    assert 0 < cache.n_rows("train") < plain.cache.n_rows("train")
    assert cache.n_rows("held_out") == plain.cache.n_rows("held_out")
    cache.verify()
    for contexts in whole_contexts(cache, "train", "resid.1"):
        assert torch.equal(contexts.token_ids, plain.cache.token_ids[contexts.sequence])
    x = torch.cat([batch.x for batch in cache.batches("held_out", "resid.1", 100)])
    assert torch.equal(x, torch.cat([b.x for b in plain.cache.batches("held_out", "resid.1", 100)]))


def test_statistics_are_those_of_a_first_sample(plain, tiny_source, tmp_path):
    moments = _rolling(tmp_path, tiny_source).moments
    assert 600 <= moments.count < plain.moments.count
    sample = torch.cat([shard.x("resid.1", slice(None)) for shard in plain.cache.shards("train")])
    torch.testing.assert_close(moments.mean, sample[: moments.count].double().mean(0))


def test_a_bound_that_everything_fits_makes_a_whole_cache(plain, tiny_source, tmp_path):
    module = _rolling(tmp_path, tiny_source, disk="1GB")
    assert not module.cache.is_rolling
    assert module.cache.manifest["shards"] == plain.cache.manifest["shards"]


def test_a_rolling_cache_becomes_a_whole_one_without_the_bound(plain, tiny_source, tmp_path):
    module = _rolling(tmp_path, tiny_source)
    _batches(_loader(module), 30)
    module.teardown("fit")
    there = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("shard*.safetensors")}
    whole = _opened(tmp_path, _longer(tiny_source))
    assert whole.cache.manifest["shards"] == plain.cache.manifest["shards"]
    assert "rolling" not in whole.cache.manifest
    assert all((tmp_path / name).stat().st_mtime_ns == when for name, when in there.items())
    torch.testing.assert_close(whole.moments.second, plain.moments.second)


def test_a_rolling_cache_killed_on_its_way_to_a_whole_one_does_not_look_whole(
    tiny_source, tmp_path, monkeypatch
):
    _rolling(tmp_path, tiny_source)

    def dies(self, *args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", dies)
        with pytest.raises(KeyboardInterrupt):
            _opened(tmp_path, _longer(tiny_source))
    with pytest.raises(InputError, match="is not finished"):
        ActivationCache(tmp_path)
    assert _rolling(tmp_path, tiny_source).cache.n_rows("held_out") > 0


def test_harvest_interrupted_before_training_continues(plain, tiny_source, tmp_path, monkeypatch):
    real, calls = ShardWriter.write, []

    def dies(self, *args):
        calls.append(1)
        if len(calls) > 2:
            raise KeyboardInterrupt
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "write", dies)
        with pytest.raises(KeyboardInterrupt):
            _rolling(tmp_path, tiny_source)
    with pytest.raises(InputError, match="is not finished"):
        ActivationCache(tmp_path)
    module = _rolling(tmp_path, tiny_source)
    expected = _batches(_loader(plain), 5)
    assert all(map(torch.equal, _batches(_loader(module), 5), expected))
    module.teardown("fit")


def test_training_on_a_rolling_cache_needs_its_source(tiny_source, tmp_path):
    _rolling(tmp_path, tiny_source)
    module = ActivationDataModule(str(tmp_path), hookpoint="resid.1", batch_size=128)
    module.prepare_data()
    module.setup()
    with pytest.raises(InputError, match="is a rolling one: training on it needs `data.source`"):
        _loader(module)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"disk": "300kB"}, "`disk` is 300 kB, but the held-out rows take"),
        ({"non_finite": "skip"}, "set `non_finite` to error"),
    ],
)
def test_what_cannot_roll_is_an_error(tiny_source, tmp_path, changes, match):
    source = dataclasses.replace(_longer(tiny_source), **{"disk": DISK, **changes})
    with pytest.raises(InputError, match=match):
        _opened(tmp_path, source)


def test_a_bound_that_does_not_hold_what_is_read_side_by_side_is_an_error(tiny_source, tmp_path, monkeypatch):
    module = _rolling(tmp_path, tiny_source)
    monkeypatch.setattr(sampler_module, "MOST_SHARDS_MIXED", 32)
    with pytest.raises(InputError, match=r"`disk` must hold the shards that are read side by side"):
        _loader(module)
