"""The harvest: rows equal a fresh forward pass, for any model and any number of ranks; nothing is lost."""

import dataclasses
import errno
import json
import multiprocessing
import random
import signal
import sys
import threading
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from sae.activations import ActivationCache, Source, harvest
from sae.activations.cache import finish as finish_module
from sae.activations.cache import places as places_module
from sae.activations.cache import plan as plan_module
from sae.activations.cache import records as records_module
from sae.activations.cache import statistics as statistics_module
from sae.activations.hookpoints import residuals
from sae.activations.language_model import load_language_model
from sae.activations.ranks import Ranks, launched_ranks
from sae.errors import InputError

harvest_module = sys.modules["sae.activations.harvest"]
begun_module = sys.modules["sae.activations.harvest_begun"]


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(plan_module, "SMALLEST_SHARD_BYTES", 60_000)


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory, tiny_source):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "SMALLEST_SHARD_BYTES", 60_000)
        return harvest(tiny_source, tmp_path_factory.mktemp("unbroken"))


def _files(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def _changed(source, **changes):
    return dataclasses.replace(source, **changes)


def test_cached_rows_equal_a_fresh_forward_pass(tiny_cache, tiny_source):
    model = load_language_model(tiny_source.model).model
    fresh = residuals(model, tiny_cache.token_ids.long(), tiny_source.hookpoints)
    for split in ("train", "held_out"):
        for hookpoint in tiny_source.hookpoints:
            for batch in tiny_cache.batches(split, hookpoint, 100):
                expected = fresh[hookpoint][batch.sequence.long(), batch.position.long()]
                torch.testing.assert_close(batch.x, expected, rtol=1e-5, atol=1e-5)


def test_cached_rows_equal_a_fresh_forward_pass_for_every_family(
    family_model, byte_tokenizer, text_file, tmp_path
):
    """Six families and more, each with several hookpoints from one pass, aligned row by row."""
    family_model.resize_token_embeddings(257, mean_resizing=False)
    family_model.save_pretrained(tmp_path / "model")
    byte_tokenizer.save_pretrained(tmp_path / "model")
    hookpoints = ["resid.3", "resid.0", "resid.2"]
    source = Source(str(tmp_path / "model"), str(text_file), hookpoints, 3000, 24, 0.3)
    cache = harvest(source, tmp_path / "cache")
    loaded = load_language_model(source.model).model
    arguments = {"input_ids": cache.token_ids.long(), "output_hidden_states": True}
    with torch.inference_mode():
        hidden = loaded(**arguments).hidden_states
    for batch in zip(*(cache.batches("train", name, 97) for name in hookpoints), strict=True):
        for name, part in zip(hookpoints, batch, strict=True):
            assert torch.equal(part.sequence, batch[0].sequence)
            if name != "resid.3":  # transformers gives the last one after the final norm
                fresh = hidden[int(name[-1])][part.sequence.long(), part.position.long()]
                torch.testing.assert_close(part.x, fresh, rtol=1e-4, atol=1e-5)


def test_two_harvests_of_one_source_are_byte_equal(tiny_cache, tiny_source, tmp_path):
    again = harvest(tiny_source, tmp_path / "again")
    assert again.manifest["shards"] == tiny_cache.manifest["shards"]


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rows_are_stored_in_the_dtype_asked_for(tiny_cache, tiny_source, tmp_path, dtype):
    cache = harvest(_changed(tiny_source, dtype=dtype), tmp_path / dtype)
    for ours, exact in zip(
        cache.batches("train", "resid.1", 512), tiny_cache.batches("train", "resid.1", 512), strict=True
    ):
        assert torch.equal(ours.x, exact.x.to(getattr(torch, dtype)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_model_in_half_precision_is_cached_as_it_computes(tiny_source, tmp_path, dtype):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_source.model, dtype=getattr(torch, dtype))
    model.save_pretrained(tmp_path / "model")
    transformers.AutoTokenizer.from_pretrained(tiny_source.model).save_pretrained(tmp_path / "model")
    cache = harvest(_changed(tiny_source, model=str(tmp_path / "model"), n_tokens=2000), tmp_path / "cache")
    assert cache.manifest["dtype"] == dtype
    batch = next(cache.batches("held_out", "resid.3", 64))
    loaded = load_language_model(str(tmp_path / "model")).model
    fresh = residuals(loaded, cache.token_ids[batch.sequence.unique().long()].long(), ["resid.3"])["resid.3"]
    torch.testing.assert_close(batch.x, fresh.flatten(0, 1)[:64], rtol=2e-2, atol=2e-2)


def test_int8_rows_are_within_half_a_step(tiny_cache, tiny_source, tmp_path):
    cache = harvest(_changed(tiny_source, dtype="int8"), tmp_path / "int8")
    assert cache.manifest["dtype"] == "int8" and set(cache.manifest["outliers"]) == {"resid.1", "resid.3"}
    for ours, exact in zip(
        cache.batches("train", "resid.3", 512), tiny_cache.batches("train", "resid.3", 512), strict=True
    ):
        assert ours.x.dtype == torch.float32
        step = exact.x.abs().amax(1, keepdim=True) / 127
        assert ((ours.x - exact.x).abs() <= step * 0.501).all()
    exact = torch.cat([b.x for b in cache.batches("train", "resid.3", 512)]).double()
    torch.testing.assert_close(cache.moments("resid.3").mean, exact.mean(0))
    assert cache.manifest["shards"][0]["bytes"] < tiny_cache.manifest["shards"][0]["bytes"] / 2


def test_int8_keeps_coordinates_that_stand_out_apart(tiny_source, tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_source.model)
    model.transformer.wpe.weight.data[:, 3] += 80
    model.save_pretrained(tmp_path / "model")
    transformers.AutoTokenizer.from_pretrained(tiny_source.model).save_pretrained(tmp_path / "model")
    source = _changed(tiny_source, model=str(tmp_path / "model"), n_tokens=3000)
    exact, cache = harvest(source, tmp_path / "a"), harvest(_changed(source, dtype="int8"), tmp_path / "b")
    assert cache.manifest["outliers"]["resid.1"] == [3]
    x, y = (next(c.batches("held_out", "resid.1", 500)).x for c in (exact, cache))
    assert torch.equal(x[:, 3], y[:, 3]) and (x - y).abs().max() < x[:, [0, 1, 2, 4]].abs().max() / 100


def test_excluded_rows_are_left_out_and_the_others_are_not_changed(tiny_cache, tiny_source, tmp_path):
    source = _changed(tiny_source, exclude_first_position=True, exclude_special_tokens=True)
    cache = harvest(source, tmp_path / "cache")
    context = source.context_length
    kept = (cache.token_ids != 256) & (torch.arange(context) > 0)
    origin = []
    for split in ("train", "held_out"):
        everything = {}
        for batch in tiny_cache.batches(split, "resid.1", 512):
            rows = batch.sequence.long() * context + batch.position
            everything |= dict(zip(rows.tolist(), batch.x, strict=True))
        for batch in cache.batches(split, "resid.1", 100):
            rows = batch.sequence.long() * context + batch.position
            origin.append(rows)
            expected = torch.stack([everything[row] for row in rows.tolist()])
            torch.testing.assert_close(batch.x, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(torch.cat(origin).sort().values, kept.flatten().nonzero().squeeze(1))
    rows = torch.cat([b.x for b in cache.batches("train", "resid.1", 512)]).double()
    torch.testing.assert_close(cache.moments("resid.1").mean, rows.mean(0))


def test_row_at_position_0_that_stands_out_is_warned_of(tiny_source, tmp_path, capsys):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_source.model)
    model.transformer.wpe.weight.data[0] *= 30
    model.save_pretrained(tmp_path / "model")
    transformers.AutoTokenizer.from_pretrained(tiny_source.model).save_pretrained(tmp_path / "model")
    source = _changed(tiny_source, model=str(tmp_path / "model"), n_tokens=2000)
    harvest(source, tmp_path / "kept")
    assert "rows of position 0 are" in capsys.readouterr().err
    harvest(_changed(source, exclude_first_position=True), tmp_path / "left-out")
    assert "position 0" not in capsys.readouterr().err


def test_bytes_a_row_are_said_before_the_harvest(tiny_cache, tiny_source, tmp_path, capsys):
    harvest(_changed(tiny_source, n_tokens=2000), tmp_path / "cache")
    assert "136 bytes a row" in capsys.readouterr().out  # 2 x 16 x 4 + 8


# Several ranks


def _ranks_harvest(source, folder, world):
    """Ranks as threads; models are loaded one after the other, as transformers loads in no other way."""
    errors, lock = [], threading.Lock()
    real = load_language_model

    def load(*args):
        with lock:
            return real(*args)

    def one(rank):
        try:
            harvest(source, folder, ranks=Ranks(rank, world))
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=one, args=(rank,), daemon=True) for rank in range(world)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(begun_module, "load_language_model", load)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert not errors, errors
    return ActivationCache(folder)


@pytest.mark.parametrize("world", [2, 3])
def test_several_ranks_make_the_same_cache(unbroken, tiny_source, tmp_path, small_shards, world):
    together = _ranks_harvest(tiny_source, tmp_path / "cache", world)
    assert together.manifest["shards"] == unbroken.manifest["shards"]
    for name in ("order.safetensors", "sequences.safetensors"):
        assert (tmp_path / "cache" / name).read_bytes() == (Path(unbroken.location) / name).read_bytes()
    for hookpoint in tiny_source.hookpoints:
        ours, theirs = together.moments(hookpoint), unbroken.moments(hookpoint)
        assert ours.count == theirs.count
        torch.testing.assert_close(ours.second, theirs.second, rtol=1e-12, atol=1e-12)
    assert sorted(_files(tmp_path / "cache")) == sorted(_files(unbroken.location))


def test_no_rank_finishes_before_all_are_counted(unbroken, tiny_source, tmp_path, small_shards, monkeypatch):
    """The sums of a wide model are saved seldom: here only at the end, by a rank that is slow at it."""
    monkeypatch.setattr(statistics_module, "_SAVED_PER_WRITTEN", 1e-9)
    real = statistics_module.RunningStatistics.save

    def slow(self):
        if "00001" in self._file:
            time.sleep(1.0)
        real(self)

    monkeypatch.setattr(statistics_module.RunningStatistics, "save", slow)
    cache = _ranks_harvest(tiny_source, tmp_path, 2)
    assert cache.moments("resid.1").count == cache.n_rows("train")
    torch.testing.assert_close(cache.moments("resid.1").second, unbroken.moments("resid.1").second)


def test_a_shard_deleted_on_the_way_is_not_counted_twice(tiny_source, tmp_path, small_shards, monkeypatch):
    writer, calls = begun_module.ShardWriter, []
    real = writer.write

    def dies(self, *args):
        calls.append(args)
        if len(calls) > 4:
            raise KeyboardInterrupt
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "write", dies)
        with pytest.raises(KeyboardInterrupt):
            harvest(tiny_source, tmp_path)
    (tmp_path / "shard-00001.safetensors").unlink()
    cache = harvest(tiny_source, tmp_path)
    assert cache.moments("resid.1").count == cache.n_rows("train")


def test_sums_left_by_a_kill_in_the_last_step_are_not_joined_again(tiny_source, tmp_path, small_shards):
    harvest(tiny_source, tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finish_module, "remove_partial", lambda place: None)
        (tmp_path / "shard-00002.safetensors").unlink()
        harvest(tiny_source, tmp_path)
    assert list(tmp_path.glob("*.partial"))
    (tmp_path / "shard-00003.safetensors").unlink()
    cache = harvest(tiny_source, tmp_path)
    assert cache.moments("resid.1").count == cache.n_rows("train")


def test_packed_text_is_checked_before_a_harvest_goes_on(tiny_source, tmp_path, small_shards, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(harvest_module, "finish_cache", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            harvest(tiny_source, tmp_path)
    path = tmp_path / "sequences.safetensors"
    data = bytearray(path.read_bytes())
    data[-40] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(InputError, match="sequences.safetensors is damaged"):
        harvest(tiny_source, tmp_path)


def test_several_ranks_mend_a_cache_together(unbroken, tiny_source, tmp_path, small_shards):
    harvest(tiny_source, tmp_path)
    expected = _files(tmp_path)
    for index in (1, 4):
        (tmp_path / f"shard-0000{index}.safetensors").unlink()
    others = (tmp_path / "shard-00003.safetensors").stat().st_mtime_ns
    _ranks_harvest(tiny_source, tmp_path, 2)
    assert {n: d for n, d in _files(tmp_path).items() if n.startswith(("shard", "order"))} == {
        n: d for n, d in expected.items() if n.startswith(("shard", "order"))
    }
    assert (tmp_path / "shard-00003.safetensors").stat().st_mtime_ns == others


def test_ranks_are_those_of_torchrun_or_of_an_srun_step(monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    assert launched_ranks() == Ranks(0, 1)
    monkeypatch.setenv("SLURM_NTASKS", "4")  # of the batch script: it starts nothing
    monkeypatch.setenv("SLURM_PROCID", "0")
    assert launched_ranks() == Ranks(0, 1)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setenv("SLURM_PROCID", "3")
    assert launched_ranks() == Ranks(3, 4)
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launched_ranks() == Ranks(1, 2)


def test_a_rank_does_not_wait_for_ever_for_one_that_died(tiny_source, tmp_path, small_shards, monkeypatch):
    monkeypatch.setattr(records_module, "STALLED_AFTER", 0.3)
    with pytest.raises(InputError, match=r"shards of .* are missing \(shard-00001.safetensors first\)"):
        harvest(tiny_source, tmp_path, ranks=Ranks(0, 2))
    with pytest.raises(InputError, match="is not finished"):
        ActivationCache(tmp_path)


# Interruptions


def _harvest_in_a_child(source, folder, shard_bytes):
    torch.set_num_threads(1)
    plan_module.SMALLEST_SHARD_BYTES = shard_bytes
    harvest(source, folder)


@pytest.mark.slow
def test_harvest_killed_at_random_points_ends_byte_equal(tiny_source, tmp_path):
    source = _changed(tiny_source, n_tokens=9_500)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "sae.activations.harvest"])
    moments = random.Random(0)

    def start(folder):
        child = context.Process(target=_harvest_in_a_child, args=(source, folder, 20_000))
        child.start()
        return child

    for name in ("warm", "whole"):  # the first one waits for the server's imports
        started = time.monotonic()
        child = start(tmp_path / name)
        child.join(120)
        assert child.exitcode == 0
    length = time.monotonic() - started
    killed, finished = 0, {}
    for _ in range(10):
        child = start(tmp_path / "killed")
        time.sleep(moments.uniform(0.2, 0.9) * length)
        child.kill()
        child.join()
        killed += child.exitcode == -signal.SIGKILL
        # Of a shard with a record; the record itself is written anew once a harvest was through in time.
        recorded = [p.with_suffix(".safetensors") for p in (tmp_path / "killed").glob("shard-*.json")]
        there = {p.name: p.stat().st_mtime_ns for p in recorded}
        again = [name for name, when in finished.items() if there.get(name, when) != when]
        assert not again, "a finished shard was harvested again"
        finished = there
    assert killed > 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "SMALLEST_SHARD_BYTES", 20_000)
        harvest(source, tmp_path / "killed")
    assert _files(tmp_path / "killed") == _files(tmp_path / "whole")


@pytest.mark.parametrize("after", [0, 1, 3])
@pytest.mark.parametrize("where", ["write", "fill", "moments"])
def test_interrupted_harvest_keeps_finished_shards_and_ends_byte_equal(
    unbroken, tiny_source, tmp_path, small_shards, monkeypatch, where, after
):
    assert len(unbroken.manifest["shards"]) > 6
    writer = begun_module.ShardWriter
    real, calls = getattr(writer, where), []

    def dies(self, *args):
        calls.append(args)
        if len(calls) > after:
            raise KeyboardInterrupt
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(writer, where, dies)
        with pytest.raises(KeyboardInterrupt):
            harvest(tiny_source, tmp_path)
    with pytest.raises(InputError, match="is not finished"):
        ActivationCache(tmp_path)
    finished = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("shard-*.safetensors")}
    assert len(finished) >= after
    opened = []
    monkeypatch.setattr(begun_module, "pack", lambda *a, **k: opened.append(1))
    harvest(tiny_source, tmp_path)
    assert not opened, "the text was packed again"
    recorded = {name: (tmp_path / name).stat().st_mtime_ns for name in finished}
    assert sum(recorded[name] != finished[name] for name in finished) <= 1  # one may lack its record
    assert _files(tmp_path) == _files(unbroken.location)


def test_another_number_of_ranks_goes_on_where_one_was_interrupted(
    unbroken, tiny_source, tmp_path, small_shards, monkeypatch
):
    writer, calls = begun_module.ShardWriter, []
    real = writer.write

    def dies(self, *args):
        calls.append(args)
        if len(calls) > 3:
            raise KeyboardInterrupt
        return real(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "write", dies)
        with pytest.raises(KeyboardInterrupt):
            harvest(tiny_source, tmp_path)
    cache = _ranks_harvest(tiny_source, tmp_path, 2)
    assert cache.manifest["shards"] == unbroken.manifest["shards"]
    torch.testing.assert_close(cache.moments("resid.1").second, unbroken.moments("resid.1").second)
    assert cache.moments("resid.1").count == unbroken.moments("resid.1").count


def test_other_weights_begin_anew(tiny_source, tiny_model, tmp_path, small_shards, monkeypatch):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_model)
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    source = _changed(tiny_source, model=str(folder))
    with monkeypatch.context() as patch:
        patch.setattr(harvest_module, "finish_cache", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            harvest(source, tmp_path / "cache")
    model.transformer.wte.weight.data.mul_(2)
    model.save_pretrained(folder)
    cache = harvest(source, tmp_path / "cache")
    batch = next(cache.batches("held_out", "resid.1", 32))
    loaded = load_language_model(str(folder)).model
    fresh = residuals(loaded, cache.token_ids[batch.sequence[:1].long()].long(), ["resid.1"])["resid.1"]
    torch.testing.assert_close(batch.x, fresh[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss", ["missing", "short"])
def test_lost_shard_of_a_finished_cache_is_made_again(unbroken, tiny_source, tmp_path, small_shards, loss):
    from sae.activations.datamodule import open_or_harvest

    harvest(tiny_source, tmp_path)
    expected = _files(tmp_path)
    shard = tmp_path / "shard-00002.safetensors"
    if loss == "missing":
        shard.unlink()
    else:
        shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(InputError, match="only what is missing is made"):
        ActivationCache(tmp_path)
    others = (tmp_path / "shard-00001.safetensors").stat().st_mtime_ns
    open_or_harvest(tmp_path, tiny_source)
    assert _files(tmp_path) == expected
    assert (tmp_path / "shard-00001.safetensors").stat().st_mtime_ns == others


def test_harvest_continues_after_a_kill_during_the_first_write(tiny_source, tmp_path):
    (tmp_path / "manifest.json.tmp").write_text("{")
    (tmp_path / "packing.tmp").mkdir()
    (tmp_path / "packing.tmp" / "train.tokens.tmp").write_bytes(b"torn")
    assert harvest(tiny_source, tmp_path).manifest["finished"]
    assert not (tmp_path / "packing.tmp").exists()


# Bad input


def _poison(monkeypatch, hookpoint="resid.3"):
    real = begun_module.reading

    class Poisoned:
        def __init__(self, *args):
            self.real = real(*args)

        def __enter__(self):
            read = self.real.__enter__()

            def poisoned(ids):
                found = {name: x.clone() for name, x in read(ids).items()}
                found[hookpoint][0, 1, 2] = float("nan")
                found[hookpoint][-1, 4, 0] = float("inf")
                return found

            return poisoned

        def __exit__(self, *args):
            return self.real.__exit__(*args)

    monkeypatch.setattr(begun_module, "reading", Poisoned)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_non_finite_activations_are_an_error_with_shard_row_and_document(
    tiny_source, tmp_path, monkeypatch, dtype
):
    _poison(monkeypatch)
    with pytest.raises(
        InputError,
        match=r"resid.3 are not finite: shard shard-00000.safetensors, row \d+ \(sequence \d+, position [14],"
        r" document \d+\).*`non_finite`: skip",
    ):
        harvest(_changed(tiny_source, dtype=dtype), tmp_path / "nan")
    with pytest.raises(InputError, match="is not finished"):
        ActivationCache(tmp_path / "nan")


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_non_finite_rows_are_skipped_and_counted_on_request(
    tiny_source, tmp_path, small_shards, monkeypatch, dtype
):
    _poison(monkeypatch)
    cache = harvest(_changed(tiny_source, dtype=dtype, non_finite="skip"), tmp_path)
    n = cache.token_ids.numel()
    rows = cache.n_rows("train") + cache.n_rows("held_out")
    assert 0 < cache.manifest["rows_skipped"] == n - rows
    assert cache.manifest["splits"]["train"]["rows"] == cache.n_rows("train")
    x = {
        name: torch.cat([b.x for b in cache.batches("train", name, 512)]).double()
        for name in cache.hookpoints
    }
    assert all(len(rows) == cache.n_rows("train") and rows.isfinite().all() for rows in x.values())
    torch.testing.assert_close(cache.moments("resid.1").mean, x["resid.1"].mean(0))
    order = load_file(tmp_path / "order.safetensors")["order"]
    stored = [b.sequence.long() * 32 + b.position for b in cache.batches("train", "resid.1", 512)]
    assert torch.equal(order, torch.cat(stored))


def test_too_little_disk_is_an_error_before_any_row_is_written(tiny_source, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(places_module.shutil, "disk_usage", lambda _: usage(10**6, 10**6, 1000))
    with pytest.raises(
        InputError, match=r"the harvest needs [\d.]+ [kM]B more .* than is free; lower `n_tokens`"
    ):
        harvest(tiny_source, tmp_path / "full")
    assert not list((tmp_path / "full").glob("shard*"))


def test_disk_that_becomes_full_is_an_error_that_says_how_much_is_missing(
    unbroken, tiny_source, tmp_path, small_shards, monkeypatch
):
    real, written = places_module._write_all, []

    def full(file, chunk):
        if sum(written) + len(chunk) > 500_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(len(chunk))
        real(file, chunk)

    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(places_module, "_write_all", full)
        with pytest.raises(InputError, match=r"became full: .* to come, so .* are missing. Finished"):
            patch.setattr(
                places_module.shutil,
                "disk_usage",
                lambda _: usage(10**9, 0, 0 if sum(written) > 450_000 else 10**9),
            )
            harvest(tiny_source, tmp_path)
    assert not list(tmp_path.glob("*.tmp"))
    kept = {p.name: p.stat().st_mtime_ns for p in tmp_path.glob("shard-*.safetensors")}
    assert len(kept) > 1
    harvest(tiny_source, tmp_path)
    assert _files(tmp_path) == _files(unbroken.location)
    assert all((tmp_path / name).stat().st_mtime_ns == when for name, when in kept.items())


def test_disk_that_is_full_before_the_first_shard_is_an_error_too(tiny_source, tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(begun_module, "pack", full)
    with pytest.raises(InputError, match="became full: .* make room and run the same command again"):
        harvest(tiny_source, tmp_path)


def test_a_refused_harvest_does_not_stand_in_the_way_of_the_next(tiny_source, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="asked for, but the data set has only"):
        harvest(_changed(tiny_source, n_tokens=10**6), tmp_path)
    assert _files(tmp_path) == {}
    usage = namedtuple("usage", "total used free")
    with monkeypatch.context() as patch:
        patch.setattr(places_module.shutil, "disk_usage", lambda _: usage(10**6, 10**6, 1000))
        with pytest.raises(InputError, match="more than is free"):
            harvest(tiny_source, tmp_path)
    assert _files(tmp_path) == {}
    assert harvest(_changed(tiny_source, n_tokens=2000), tmp_path).manifest["finished"]


def test_few_held_out_rows_are_warned_of(tiny_source, tmp_path, capsys):
    harvest(_changed(tiny_source, n_tokens=2000), tmp_path / "few")
    assert ("rows are held out" in capsys.readouterr().err) == (
        ActivationCache(tmp_path / "few").n_rows("held_out") < 0.1 * 1984
    )


def test_folder_with_other_files_is_left_alone(tiny_source, tmp_path):
    (tmp_path / "thesis.tex").write_text("mine")
    with pytest.raises(InputError, match="holds files but no activation cache"):
        harvest(tiny_source, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_finished_cache_of_another_source_is_left_alone(tiny_cache, tiny_source):
    before = _files(tiny_cache.location)
    with pytest.raises(InputError, match="holds the cache of another source"):
        harvest(_changed(tiny_source, n_tokens=2000), tiny_cache.location)
    assert _files(tiny_cache.location) == before


def test_context_longer_than_the_model_is_an_error(tiny_source, tmp_path):
    with pytest.raises(InputError, match="`context_length` must be at most 64"):
        harvest(_changed(tiny_source, context_length=65), tmp_path / "long")


def test_context_that_the_model_cannot_run_is_an_error(tmp_path, byte_tokenizer, text_file):
    """RoBERTa keeps two of its positions for itself."""
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


def test_manifest_is_plain_json_with_all_that_was_asked_for(unbroken, tiny_source):
    manifest = json.loads((Path(unbroken.location) / "manifest.json").read_text())
    assert manifest["source"] == tiny_source.identity() and manifest["rows_per_context"] == 32
    assert manifest["splits"]["train"]["rows"] == manifest["splits"]["train"]["sequences"] * 32
