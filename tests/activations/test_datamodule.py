"""The datamodule: finds, makes or refuses caches; batches are the sampler's; resumes exactly."""

import dataclasses
from pathlib import Path

import pytest

from sae.activations import ActivationDataModule, Source
from sae.activations.datamodule import cache_folder
from sae.errors import InputError


def _module(cache, **kwargs):
    module = ActivationDataModule(
        **({"cache": str(cache.location), "hookpoint": "resid.1", "batch_size": 64} | kwargs)
    )
    module.prepare_data()
    module.setup()
    return module


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


def test_default_folder_is_named_after_the_source():
    folder = Path(cache_folder(None, Source()))
    assert folder.parent.name == "caches" and folder.name.startswith("demo-resid.2-")
    assert str(folder) != cache_folder(None, Source(n_tokens=1))
    assert str(folder) == cache_folder(None, Source(disk="50GB"))  # the same shards, kept or not
    assert cache_folder("s3://bucket/a", None) == "s3://bucket/a"


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
