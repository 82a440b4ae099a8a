"""The cache: rows equal a fresh forward pass, nothing partial looks whole, damage is found."""

import json
import shutil
from collections import namedtuple

import pytest
import torch

from sae.activations import ActivationCache, Source, harvest
from sae.activations.hookpoints import residuals
from sae.activations.imported import import_rows
from sae.activations.language_model import load_language_model
from sae.errors import InputError

harvest_module = __import__("sys").modules["sae.activations.harvest"]


@pytest.fixture
def copied(tiny_cache, tmp_path):
    folder = tmp_path / "cache"
    shutil.copytree(tiny_cache.folder, folder)
    return folder


def _edit(folder, **changes):
    path = folder / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_cached_rows_equal_a_fresh_forward_pass(tiny_cache, tiny_source):
    model = load_language_model(tiny_source.model).model
    fresh = residuals(model, tiny_cache.token_ids.long(), tiny_source.hookpoints)
    for split in ("train", "held_out"):
        for hookpoint in tiny_source.hookpoints:
            for batch in tiny_cache.batches(split, hookpoint, 100):
                expected = fresh[hookpoint][batch.sequence.long(), batch.position.long()]
                torch.testing.assert_close(batch.x, expected, rtol=1e-5, atol=1e-5)


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
    from safetensors.torch import load_file

    order = load_file(tiny_cache.folder / "order.safetensors")["order"]
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


def test_two_harvests_of_one_source_are_byte_equal(tiny_cache, tiny_source, tmp_path):
    again = harvest(tiny_source, tmp_path / "again")
    assert again.manifest["shards"] == tiny_cache.manifest["shards"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rows_are_stored_in_the_dtype_asked_for(tiny_source, tmp_path, dtype):
    source = Source(**{**tiny_source.__dict__, "dtype": dtype, "n_tokens": 2000})
    cache = harvest(source, tmp_path / dtype)
    assert next(cache.batches("train", "resid.1", 10)).x.dtype == getattr(torch, dtype)


def test_interrupted_harvest_keeps_finished_shards_and_ends_the_same(
    tiny_cache, tiny_source, tmp_path, monkeypatch
):
    monkeypatch.setattr(harvest_module, "SHARD_BYTES", 60_000)
    unbroken = harvest(tiny_source, tmp_path / "unbroken")
    assert len(unbroken.manifest["shards"]) > 4
    written = []
    real = harvest_module._Harvest._write

    def dies(self, shard, bar):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(shard.file)
        return real(self, shard, bar)

    monkeypatch.setattr(harvest_module._Harvest, "_write", dies)
    with pytest.raises(KeyboardInterrupt):
        harvest(tiny_source, tmp_path / "broken")
    with pytest.raises(InputError, match="is not finished"):
        ActivationCache(tmp_path / "broken")
    rewritten = []
    monkeypatch.setattr(
        harvest_module._Harvest, "_write", lambda self, s, bar: rewritten.append(s.file) or real(self, s, bar)
    )
    resumed = harvest(tiny_source, tmp_path / "broken")
    assert not set(written) & set(rewritten)
    assert resumed.manifest["shards"] == unbroken.manifest["shards"]
    assert resumed.manifest["statistics"] == unbroken.manifest["statistics"]


def test_shards_of_the_first_try_survive_an_interruption_while_they_are_checked(
    tiny_source, tmp_path, monkeypatch
):
    monkeypatch.setattr(harvest_module, "SHARD_BYTES", 60_000)
    write, keep, written, kept = harvest_module._Harvest._write, harvest_module._Harvest._keep, [], []

    def dying(calls, limit, real):
        def call(self, shard, argument):
            if len(calls) == limit:
                raise KeyboardInterrupt
            calls.append(shard.file)
            return real(self, shard, argument)

        return call

    monkeypatch.setattr(harvest_module._Harvest, "_write", dying(written, 3, write))
    with pytest.raises(KeyboardInterrupt):
        harvest(tiny_source, tmp_path / "cache")
    monkeypatch.setattr(harvest_module._Harvest, "_write", dying(written, None, write))
    monkeypatch.setattr(harvest_module._Harvest, "_keep", dying(kept, 1, keep))
    with pytest.raises(KeyboardInterrupt):
        harvest(tiny_source, tmp_path / "cache")
    monkeypatch.setattr(harvest_module._Harvest, "_keep", keep)
    assert harvest(tiny_source, tmp_path / "cache").manifest["finished"]
    assert len(written) == len(set(written)), "a finished shard was harvested again"


def test_damaged_shard_of_an_interrupted_harvest_is_made_again(tiny_source, tmp_path, monkeypatch):
    monkeypatch.setattr(harvest_module, "SHARD_BYTES", 60_000)
    unbroken = harvest(tiny_source, tmp_path / "unbroken")
    manifest = json.loads((tmp_path / "unbroken" / "manifest.json").read_text())
    (tmp_path / "unbroken" / "shard-00001.safetensors").write_bytes(b"torn")
    manifest["finished"], manifest["files"] = False, manifest["files"][:2]  # before the statistics
    _edit(tmp_path / "unbroken", **manifest)
    assert harvest(tiny_source, tmp_path / "unbroken").manifest["shards"] == unbroken.manifest["shards"]


def test_truncated_shard_is_an_error(copied):
    shard = copied / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"shard-00000.* has [\d,]+ bytes, the manifest says"):
        ActivationCache(copied)


def test_missing_shard_is_an_error(copied):
    (copied / "shard-00001.safetensors").unlink()
    with pytest.raises(InputError, match=r"shard-00001.* is missing"):
        ActivationCache(copied)


def test_missing_statistics_are_an_error(copied):
    (copied / "moments.safetensors").unlink()
    with pytest.raises(InputError, match=r"moments.safetensors is missing"):
        ActivationCache(copied)


def test_harvest_continues_after_a_kill_during_the_first_write(tiny_source, tmp_path):
    (tmp_path / "manifest.json.tmp").write_text("{")
    assert harvest(tiny_source, tmp_path).manifest["finished"]


def test_flipped_byte_is_found_by_verify(copied):
    path = copied / "shard-00000.safetensors"
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(InputError, match=r"shard-00000.* is not what was written"):
        ActivationCache(copied).verify()


def test_verify_accepts_a_sound_cache(tiny_cache):
    tiny_cache.verify()
    assert tiny_cache.manifest["finished"]


def test_shard_that_is_no_safetensors_file_is_an_error(copied):
    path = copied / "shard-00000.safetensors"
    path.write_bytes(b"\xff" * path.stat().st_size)
    with pytest.raises(InputError, match=r"shard .* is damaged"):
        next(ActivationCache(copied).batches("train", "resid.1", 4))


def test_rows_disagreeing_with_the_manifest_are_an_error(copied):
    shards = json.loads((copied / "manifest.json").read_text())["shards"]
    shards[0]["rows"] += 1
    _edit(copied, shards=shards)
    with pytest.raises(InputError, match=r"holds \d+ rows of 'resid.1', the manifest says"):
        next(ActivationCache(copied).batches("train", "resid.1", 4))


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"format": "sae-activation-cache/9"}, "has format 'sae-activation-cache/9'"),
        ({"finished": False}, "is not finished"),
        ({"shards": None}, "is incomplete"),
        ({"shards": [{"file": "../x", "split": "train", "rows": 1, "bytes": 1}]}, "names the file '../x'"),
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


def test_non_finite_activations_are_an_error_with_shard_and_row(tiny_source, tmp_path, monkeypatch):
    def poisoned(model, ids, hookpoints):
        found = {name: x.clone() for name, x in residuals(model, ids, hookpoints).items()}
        found["resid.3"][0, 1, 2] = float("nan")
        return found

    monkeypatch.setattr(harvest_module, "residuals", poisoned)
    with pytest.raises(
        InputError,
        match=r"resid.3 are not finite: shard shard-00000.safetensors, row \d+ \(sequence \d+, position 1,",
    ):
        harvest(tiny_source, tmp_path / "nan")
    with pytest.raises(InputError, match="is not finished"):
        ActivationCache(tmp_path / "nan")


def test_too_little_disk_is_an_error_before_anything_is_written(tiny_source, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(harvest_module.shutil, "disk_usage", lambda _: usage(10**6, 10**6, 1000))
    with pytest.raises(
        InputError, match=r"the harvest needs [\d.]+MB .* more than is free; lower `n_tokens`"
    ):
        harvest(tiny_source, tmp_path / "full")
    assert list((tmp_path / "full").iterdir()) == []


def test_folder_with_other_files_is_left_alone(tiny_source, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match="holds files but no activation cache"):
        harvest(tiny_source, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_context_longer_than_the_model_is_an_error(tiny_source, tmp_path):
    with pytest.raises(InputError, match="`context_length` must be at most 64"):
        harvest(Source(**{**tiny_source.__dict__, "context_length": 65}), tmp_path / "long")


def test_context_that_the_model_cannot_run_is_an_error(tmp_path, byte_tokenizer, text_file):
    """RoBERTa keeps two of its positions for itself."""
    import transformers

    config = transformers.RobertaConfig(
        vocab_size=257, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=40, pad_token_id=0,
    )  # fmt: skip
    transformers.RobertaForMaskedLM(config).save_pretrained(tmp_path / "model")
    byte_tokenizer.save_pretrained(tmp_path / "model")
    source = Source(
        str(tmp_path / "model"), str(text_file), ["resid.1"], 4000, context_length=40, held_out=0.2
    )
    with pytest.raises(InputError, match="cannot run a context of `context_length`=40"):
        harvest(source, tmp_path / "cache")


def test_imported_rows_come_back_shuffled_with_their_statistics(tmp_path):
    x = torch.randn(1000, 4)
    cache = import_rows(x, tmp_path / "rows", held_out=0.1)
    train = torch.cat([b.x for b in cache.batches("train", "acts", 128)])
    held_out = torch.cat([b.x for b in cache.batches("held_out", "acts", 128)])
    assert torch.equal(held_out, x[900:]) and not torch.equal(train, x[:900])
    assert torch.equal(train.sort(0).values, x[:900].sort(0).values)
    torch.testing.assert_close(cache.moments("acts").mean, x[:900].double().mean(0))


def test_imported_rows_that_are_not_finite_are_an_error(tmp_path):
    x = torch.zeros(100, 3)
    x[17, 1] = float("inf")
    with pytest.raises(InputError, match="row 17 is not finite"):
        import_rows(x, tmp_path / "rows")
