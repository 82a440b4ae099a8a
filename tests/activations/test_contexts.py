"""Whole contexts come back from shuffled shards exactly as the model computed them."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sae.activations import ActivationCache, harvest
from sae.activations.cache import Shard
from sae.activations.cache import plan as plan_module
from sae.activations.cache.tensor_file import checksum
from sae.activations.contexts import (
    cached_positions,
    held_out_cached,
    held_out_token_ids,
    token_ids_of,
    whole_contexts,
)
from sae.activations.exchange.imported import import_rows
from sae.activations.hookpoints import residuals
from sae.activations.language_model import load_language_model
from sae.errors import InputError


@pytest.fixture(scope="module")
def several_shards(tmp_path_factory, tiny_source):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "SMALLEST_SHARD_BYTES", 32 * 40 * 136)
        return harvest(tiny_source, tmp_path_factory.mktemp("several") / "cache")


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("tokens_at_once", [1, 100, 8192])
def test_contexts_are_what_the_model_computes(several_shards, tiny_source, split, tokens_at_once):
    assert len(several_shards.shards("train")) > 2
    model = load_language_model(tiny_source.model).model
    seen = []
    for batch in whole_contexts(several_shards, split, "resid.3", tokens_at_once):
        expected = residuals(model, batch.token_ids, ["resid.3"])["resid.3"]
        torch.testing.assert_close(batch.x, expected, atol=1e-4, rtol=1e-4)
        assert torch.equal(batch.token_ids, token_ids_of(several_shards)[batch.sequence])
        seen += batch.sequence.tolist()
    n_train = several_shards.manifest["splits"]["train"]["sequences"]
    everything = range(n_train) if split == "train" else range(n_train, len(token_ids_of(several_shards)))
    assert sorted(seen) == list(everything)


def test_held_out_tokens_are_those_of_the_held_out_rows(tiny_cache):
    batches = list(whole_contexts(tiny_cache, "held_out", "resid.1"))
    assert torch.equal(torch.cat([b.token_ids for b in batches]), held_out_token_ids(tiny_cache))


def test_imported_rows_have_no_contexts(tmp_path):
    cache = import_rows(torch.randn(100, 8), tmp_path / "rows")
    with pytest.raises(InputError, match="holds no token ids"):
        next(whole_contexts(cache, "train", "acts"))
    with pytest.raises(InputError, match="holds no token ids"):
        held_out_cached(cache)


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("share", [0.02, 0.5, 0.97])
def test_contexts_have_the_rows_that_are_cached_and_zeros_elsewhere(
    several_shards, tmp_path, drop_rows, split, share
):
    n_train = several_shards.manifest["splits"]["train"]["sequences"]
    token_ids = token_ids_of(several_shards)
    cached = torch.rand(token_ids.shape) < share
    cached[[0, n_train]] = False  # contexts without any row
    whole = {
        int(s): x
        for b in whole_contexts(several_shards, split, "resid.1")
        for s, x in zip(b.sequence, b.x, strict=True)
    }
    cache = drop_rows(several_shards, tmp_path / "cache", cached)
    seen = []
    for batch in whole_contexts(cache, split, "resid.1", 100):
        assert torch.equal(batch.cached, cached[batch.sequence])
        assert torch.equal(batch.token_ids, token_ids[batch.sequence])
        expected = torch.stack([whole[s] for s in batch.sequence.tolist()])
        assert torch.equal(batch.x, expected * batch.cached[..., None])
        seen += batch.sequence.tolist()
    rowless = set(range(len(cached))) - set(cached.any(1).nonzero().flatten().tolist())
    everything = range(n_train) if split == "train" else range(n_train, len(cached))
    expected = [i for i in everything if i not in rowless]
    assert len(expected) < len(everything)
    assert (seen if split == "held_out" else sorted(seen)) == expected


def test_the_first_contexts_of_a_train_shard_are_not_the_earliest_documents(tiny_cache):
    assert len(tiny_cache.shards("train")) == 1
    once, again = (
        torch.cat([b.sequence for b in whole_contexts(tiny_cache, "train", "resid.1", tokens_at_once=size)])
        for size in (64, 8192)
    )
    assert torch.equal(once, again)
    half = once[: len(once) // 2].double()  # 87 of 175: a random half has mean 87 with deviation 3.8
    assert abs(float(half.mean()) - 87) < 15 and float(half.std()) > 40


def test_every_shard_is_closed_also_where_reading_stops_early(several_shards, monkeypatch):
    closed = []
    monkeypatch.setattr(Shard, "close", lambda shard: closed.append(shard.file))
    paths = [shard.file for shard in several_shards.shards("train")]
    list(whole_contexts(several_shards, "train", "resid.1"))
    assert closed == paths
    some = whole_contexts(several_shards, "train", "resid.1", tokens_at_once=32)
    next(some)
    some.close()
    assert closed == [*paths, paths[0]]


def test_tokens_are_views_of_the_file(tiny_cache):
    def mapped() -> int:
        """How often the file is mapped into this process."""
        return (
            Path("/proc/self/maps")
            .read_text()
            .count(str(Path(tiny_cache.location) / "sequences.safetensors"))
        )

    before = mapped() if Path("/proc/self/maps").exists() else None
    token_ids, held_out = token_ids_of(tiny_cache), held_out_token_ids(tiny_cache)
    assert token_ids.dtype == held_out.dtype == torch.int32
    assert torch.equal(token_ids[175:], held_out) and len(held_out) == 74
    if before is not None:
        assert mapped() > before


def test_where_rows_are_cached_is_read_from_the_token_file(tiny_cache, without_first):
    assert cached_positions(tiny_cache) is None and held_out_cached(tiny_cache) is None
    everywhere, held_out = cached_positions(without_first), held_out_cached(without_first)
    assert not everywhere[:, 0].any() and everywhere[:, 1:].all() and everywhere.shape == (249, 32)
    assert torch.equal(held_out, everywhere[175:])


@pytest.mark.parametrize(
    ("name", "damage", "match"),
    [
        ("sequence", lambda t: t.index_fill(0, torch.tensor([5]), 249), "of sequence 249, there are 249"),
        ("sequence", lambda t: t.index_fill(0, torch.tensor([5]), -1), "of sequence -1"),
        ("position", lambda t: t.index_fill(0, torch.tensor([5]), 32), "of position 32, there are 32"),
        ("position", lambda t: t.clamp(min=1), "two rows of sequence 0, position 1"),
        ("position", None, "holds no token ids"),
    ],
)
def test_a_shard_whose_rows_come_from_nowhere_is_an_error(tmp_path, tiny_cache, name, damage, match):
    folder = Path(shutil.copytree(tiny_cache.location, tmp_path / "cache"))
    manifest = json.loads((folder / "manifest.json").read_text())
    entry = manifest["shards"][0]
    tensors = load_file(folder / entry["file"])
    origin = tensors.pop(name)
    (folder / entry["file"]).unlink()
    save_file(tensors | ({} if damage is None else {name: damage(origin)}), folder / entry["file"])
    entry["bytes"] = (folder / entry["file"]).stat().st_size
    entry["checksum"] = checksum((folder / entry["file"]).read_bytes())
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=match):
        list(whole_contexts(ActivationCache(folder), "train", "resid.1"))


def test_a_damaged_token_file_is_an_error(tmp_path, tiny_cache):
    folder = Path(shutil.copytree(tiny_cache.location, tmp_path / "cache"))
    cache = ActivationCache(folder)
    (folder / "sequences.safetensors").write_bytes(b"no tensors")
    for read in (token_ids_of, held_out_cached):
        with pytest.raises(InputError, match="sequences.safetensors is damaged"):
            read(cache)
