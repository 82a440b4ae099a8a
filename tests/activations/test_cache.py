"""A cache on disk: what the contract says of it, and nothing damaged or partial passes for whole."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sae.activations import ActivationCache
from sae.activations.cache.tensor_file import checksum
from sae.errors import InputError


@pytest.fixture
def copied(tiny_cache, tmp_path):
    folder = tmp_path / "cache"
    shutil.copytree(tiny_cache.location, folder)
    return folder


def _rewrite(folder, path, data):
    """Other bytes, with the checksum that belongs to them."""
    path.write_bytes(data)
    shards = json.loads((folder / "manifest.json").read_text())["shards"]
    for entry in shards:
        if entry["file"] == path.name:
            entry["checksum"] = checksum(data)
    _edit(folder, shards=shards)


def _edit(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_every_position_of_every_context_is_cached_once(tiny_cache):
    n, context = tiny_cache.token_ids.shape
    seen = [
        (batch.sequence.long() * context + batch.position)
        for split in ("train", "held_out")
        for batch in tiny_cache.batches(split, "resid.1", 100)
    ]
    assert torch.equal(torch.cat(seen).sort().values, torch.arange(n * context))


def test_train_rows_are_mixed_and_held_out_rows_are_in_order(tiny_cache):
    train = next(tiny_cache.batches("train", "resid.1", 1000))
    assert (train.sequence.diff() == 0).float().mean() < 0.05
    held_out = torch.cat(
        [b.sequence.long() * 32 + b.position for b in tiny_cache.batches("held_out", "resid.1", 64)]
    )
    assert torch.equal(held_out, held_out.sort().values)


def test_order_file_finds_a_sequences_rows_again(tiny_cache):
    order = load_file(Path(tiny_cache.location) / "order.safetensors")["order"]
    stored = torch.cat(
        [b.sequence.long() * 32 + b.position for b in tiny_cache.batches("train", "resid.1", 64)]
    )
    assert torch.equal(order, stored)


def test_moments_are_those_of_all_train_rows(tiny_cache):
    x = torch.cat([b.x for b in tiny_cache.batches("train", "resid.3", 64)]).double()
    moments = tiny_cache.moments("resid.3")
    assert moments.count == len(x)
    torch.testing.assert_close(moments.mean, x.mean(0))
    torch.testing.assert_close(moments.second, x.T @ x / len(x))
    statistics = tiny_cache.manifest["statistics"]["resid.3"]
    assert statistics["mean_squared_norm"] == pytest.approx(float(x.square().sum(1).mean()))


def test_manifest_names_what_the_contract_asks_for(tiny_cache):
    contract = {"format", "model", "model_hash", "tokenizer", "dataset", "hookpoints", "d_model", "dtype",
                "context_length", "splits", "statistics", "shards", "finished"}  # fmt: skip
    assert contract <= set(tiny_cache.manifest)
    assert tiny_cache.d_model("resid.1") == 16 and tiny_cache.hookpoints == ["resid.1", "resid.3"]


def test_truncated_shard_is_an_error(copied):
    shard = copied / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"shard-00000.* has [\d,]+ bytes instead of [\d,]+;"):
        ActivationCache(copied)


def test_missing_shard_is_an_error(copied):
    (copied / "shard-00001.safetensors").unlink()
    with pytest.raises(InputError, match=r"shard-00001.* is missing"):
        ActivationCache(copied)


def test_missing_statistics_are_an_error(copied):
    (copied / "moments.safetensors").unlink()
    with pytest.raises(InputError, match=r"moments.safetensors is missing"):
        ActivationCache(copied)


def _flip(path, at=-7):
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(bytes(data))


def test_flipped_byte_is_found_by_verify(copied):
    _flip(copied / "shard-00000.safetensors")
    with pytest.raises(InputError, match=r"shard-00000.safetensors is damaged: its checksum"):
        ActivationCache(copied).verify()


@pytest.mark.parametrize("file", ["sequences", "order", "moments"])
def test_flipped_byte_of_any_file_is_found_by_verify(copied, file):
    _flip(copied / f"{file}.safetensors")
    with pytest.raises(InputError, match=rf"{file}.safetensors is damaged"):
        ActivationCache(copied).verify()


def test_flipped_byte_is_found_when_a_shard_is_first_read(copied):
    shard = copied / "shard-00001.safetensors"
    _flip(shard, len(shard.read_bytes()) // 2)
    cache = ActivationCache(copied)
    assert len(list(cache.batches("train", "resid.1", 512))) > 2
    with pytest.raises(InputError, match=r"shard-00001.safetensors is damaged: its checksum"):
        next(cache.batches("held_out", "resid.1", 512))


def test_checksums_of_earlier_versions_are_understood(copied):
    """They were SHA-256."""
    manifest = json.loads((copied / "manifest.json").read_text())
    for entry in [*manifest["shards"], *manifest["files"]]:
        digest = hashlib.sha256((copied / entry["file"]).read_bytes()).hexdigest()
        entry["checksum"] = f"sha256:{digest}"
    _edit(copied, **manifest)
    ActivationCache(copied).verify()
    _flip(copied / "shard-00000.safetensors")
    with pytest.raises(InputError, match="shard-00000"):
        ActivationCache(copied).verify()


def test_verify_names_every_damaged_file(copied):
    for name in ("shard-00001", "moments", "shard-00000"):
        _flip(copied / f"{name}.safetensors")
    with pytest.raises(InputError) as error:
        ActivationCache(copied).verify()
    assert all(f"{name}.safetensors is damaged" in str(error.value) for name in ("shard-00000", "moments"))
    assert "shard-00001" in str(error.value) and "order" not in str(error.value)


def test_a_batch_of_nothing_is_an_error(tiny_cache):
    with pytest.raises(InputError, match="`batch_size` must be at least 1, got 0"):
        next(tiny_cache.batches("train", "resid.1", 0))


def test_verify_accepts_a_sound_cache(tiny_cache):
    tiny_cache.verify()
    assert tiny_cache.manifest["finished"]


def test_shard_that_is_no_safetensors_file_is_an_error(copied):
    path = copied / "shard-00000.safetensors"
    _rewrite(copied, path, b"\xff" * path.stat().st_size)
    with pytest.raises(InputError, match=r"shard .* is damaged"):
        next(ActivationCache(copied).batches("train", "resid.1", 4))


def test_rows_disagreeing_with_the_manifest_are_an_error(copied):
    shards = json.loads((copied / "manifest.json").read_text())["shards"]
    shards[0]["rows"] += 1
    _edit(copied, shards=shards)
    with pytest.raises(InputError, match=r"holds \d+ rows of '[a-z.13]+', the manifest says"):
        next(ActivationCache(copied).batches("train", "resid.1", 4))


_SHARD = {"file": "s.safetensors", "split": "train", "rows": 1, "bytes": 1, "checksum": "xxh3:0"}


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"format": "sae-activation-cache/9"}, "has format 'sae-activation-cache/9', newer than"),
        ({"format": "something-else/1"}, "has format 'something-else/1', this version reads"),
        ({"finished": False}, "is not finished"),
        ({"shards": None}, "is incomplete"),
        ({"shards": [_SHARD | {"file": "../x"}]}, "names the file '../x'"),
        ({"shards": [_SHARD | {"file": "/etc/passwd"}]}, "names the file '/etc/passwd'"),
        ({"shards": [_SHARD, _SHARD]}, "lists s.safetensors twice"),
        ({"shards": [_SHARD | {"checksum": "crc:1"}]}, "checksum of unknown kind 'crc'"),
        ({"shards": [_SHARD | {"split": "test"}]}, "is incomplete"),
        ({"shards": [_SHARD | {"bytes": "1"}]}, "is incomplete"),
        ({"dtype": "float9"}, "is incomplete .`dtype` is 'float9'"),
        ({"d_model": 5}, "is incomplete"),
        ({"d_model": {"resid.1": "16", "resid.3": 16}}, "`d_model` of resid.1 is '16'"),
        ({"statistics": {}}, "is incomplete"),
        ({"splits": None}, "is incomplete"),
        ({"rolling": 3}, "is incomplete"),
        ({"rolling": {"train": ["../x"]}}, "`rolling` names '../x'"),
    ],
)
def test_manifests_that_cannot_be_used_are_errors(copied, changes, match):
    _edit(copied, **changes)
    with pytest.raises(InputError, match=match):
        ActivationCache(copied)


def test_folder_without_manifest_is_an_error(tmp_path):
    with pytest.raises(InputError, match="is not an activation cache"):
        ActivationCache(tmp_path)


def test_hookpoint_not_cached_is_an_error(tiny_cache):
    with pytest.raises(InputError, match=r"'resid.2' is not in the cache .* it has resid.1, resid.3"):
        tiny_cache.d_model("resid.2")
