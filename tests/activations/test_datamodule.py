"""The datamodule: finds, makes or refuses caches; batches are the sampler's; resumes exactly."""

import dataclasses
from collections import Counter

import pytest
import torch

from sae.activations import ActivationDataModule, Source
from sae.activations.datamodule import TrainLoader, cache_folder
from sae.errors import InputError


def _module(cache, **kwargs):
    module = ActivationDataModule(
        **({"cache": str(cache.folder), "hookpoint": "resid.1", "batch_size": 64} | kwargs)
    )
    module.prepare_data()
    module.setup()
    return module


def test_batches_hold_train_rows_each_once_per_pass(tiny_cache):
    loader = _module(tiny_cache).train_dataloader()
    rows = torch.cat([batch.x for batch in loader])
    cached = torch.cat([b.x for b in tiny_cache.batches("train", "resid.1", 512)])
    assert len(rows) == len(cached) // 64 * 64
    given, there = (Counter(row.numpy().tobytes() for row in x) for x in (rows, cached))
    assert given <= there  # as multisets: equal prefixes make equal rows


def test_ranks_share_each_batch_without_overlap(tiny_cache):
    whole = next(iter(TrainLoader(tiny_cache, "resid.1", 64, 0, 0, 1))).x
    parts = [next(iter(TrainLoader(tiny_cache, "resid.1", 64, 0, rank, 2))).x for rank in (0, 1)]
    assert torch.equal(torch.stack(parts, dim=1).flatten(0, 1), whole)


def test_loader_continues_where_it_was_saved_across_passes(tiny_cache):
    def stream(loader, count):
        found = []
        while len(found) < count:
            found += [batch.x for batch, _ in zip(loader, range(count - len(found)), strict=False)]
        return found

    unbroken = TrainLoader(tiny_cache, "resid.1", 64, 0, 0, 1)
    expected = stream(unbroken, 150)
    broken = TrainLoader(tiny_cache, "resid.1", 64, 0, 0, 1)
    iterator = iter(broken)
    for _ in range(70):
        next(iterator)
    resumed = TrainLoader(tiny_cache, "resid.1", 64, 7, 0, 1)  # another seed: the saved one counts
    resumed.load_state_dict(broken.state_dict())
    for ours, reference in zip(stream(resumed, 80), expected[70:], strict=True):
        assert torch.equal(ours, reference)


def test_missing_cache_is_harvested_and_then_reused(tiny_source, tmp_path):
    source = dataclasses.replace(tiny_source, n_tokens=2000, hookpoints=["resid.1"])
    module = ActivationDataModule(str(tmp_path / "new"), source)
    module.prepare_data()
    written = (tmp_path / "new" / "shard-00000.safetensors").stat().st_mtime_ns
    module.prepare_data()
    module.setup()
    assert (tmp_path / "new" / "shard-00000.safetensors").stat().st_mtime_ns == written
    assert module.hookpoint == "resid.1" and module.d_model == 16


def test_cache_of_another_source_is_an_error_that_names_the_keys(tiny_cache, tiny_source):
    other = dataclasses.replace(tiny_source, n_tokens=5000, context_length=16)
    with pytest.raises(
        InputError, match=r"differs in n_tokens \(cache: 8000, config: 5000\); context_length"
    ):
        _module(tiny_cache, source=other)


def test_missing_cache_without_source_is_an_error(tmp_path):
    with pytest.raises(InputError, match="does not exist and there is no `data.source`"):
        ActivationDataModule(str(tmp_path / "none")).prepare_data()


def test_neither_cache_nor_source_is_an_error():
    with pytest.raises(InputError, match="`data.cache` or `data.source` must be given"):
        ActivationDataModule()


def test_hookpoint_must_be_chosen_among_several(tiny_cache):
    with pytest.raises(InputError, match="`hookpoint` must be given: .* has resid.1, resid.3"):
        _module(tiny_cache, hookpoint=None)


def test_batch_that_ranks_do_not_divide_is_an_error(tiny_cache):
    with pytest.raises(InputError, match="`batch_size`=63 must be a multiple of the 2 ranks"):
        TrainLoader(tiny_cache, "resid.1", 63, 0, 0, 2)


def test_default_folder_is_named_after_the_source():
    folder = cache_folder(None, Source())
    assert folder.parent.name == "caches" and folder.name.startswith("demo-resid.2-")
    assert folder != cache_folder(None, Source(n_tokens=1))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"n_tokens": 0}, "`n_tokens` must be at least 1"),
        ({"held_out": 0.0}, "`held_out` must lie between 0 and 1"),
        ({"held_out": 1.0}, "`held_out` must lie between 0 and 1"),
    ],
)
def test_source_out_of_range_is_an_error(changes, match):
    with pytest.raises(InputError, match=match):
        ActivationDataModule(source=Source(**changes))


def test_reading_a_cache_needs_no_language_model(tiny_cache, monkeypatch):
    import transformers

    def refuse(*args, **kwargs):
        raise AssertionError("the language model was loaded")

    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", refuse)
    module = _module(tiny_cache)
    assert next(iter(module.train_dataloader())).x.shape == (64, 16)
