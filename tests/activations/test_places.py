"""Places: files are there whole or not at all, on this machine and behind a URL."""

import dataclasses
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import torch

from sae.activations import ActivationCache, ActivationDataModule, harvest
from sae.activations import sampler as sampler_module
from sae.activations.cache import plan as plan_module
from sae.activations.cache.places import LocalPlace, RemotePlace, place_at
from sae.activations.cache.writer import ShardWriter
from sae.errors import InputError


@pytest.fixture(params=["local", "memory"])
def place(request, tmp_path):
    if request.param == "local":
        return place_at(tmp_path / "place")
    return RemotePlace(f"memory://{uuid.uuid4()}/place", fetched=tmp_path / "fetched")


def test_files_written_are_there_whole(place):
    assert place.sizes() == {} and place.size("a") is None
    place.write("a", [b"12", memoryview(b"345")])
    place.write("b", [])
    assert place.sizes() == {"a": 5, "b": 0} and place.size("a") == 5
    assert place.read("a") == b"12345" and place.local("a").read_bytes() == b"12345"
    place.write("a", [b"6"])
    assert place.read("a") == b"6" and place.local("a").read_bytes() == b"6"
    place.remove("a")
    place.remove("a")
    assert place.size("a") is None
    with pytest.raises(FileNotFoundError):
        place.read("a")


def test_a_write_that_fails_leaves_the_old_file(place):
    place.write("a", [b"old"])

    def torn():
        yield b"ne"
        raise OSError("the cable")

    with pytest.raises(OSError, match="cable"):
        place.write("a", torn())
    assert place.read("a") == b"old" and place.sizes() == {"a": 3}


def test_fetched_files_beyond_the_limit_go_when_they_are_released(tmp_path):
    place = RemotePlace(f"memory://{uuid.uuid4()}/x", limit=25, fetched=tmp_path / "fetched")
    for name in "abc":
        place.write(name, [b"0123456789"])
        place.local(name)
    place.release("a")
    place.release("b")
    assert sorted(p.name for p in (tmp_path / "fetched").iterdir()) == ["b", "c"]
    assert place.local("a").read_bytes() == b"0123456789"


def test_urls_and_paths_are_told_apart(tmp_path):
    assert isinstance(place_at("memory://a/b"), RemotePlace)
    local = place_at(f"file://{tmp_path}")
    assert isinstance(local, LocalPlace) and local.folder == tmp_path
    assert place_at(local) is local


def test_protocol_that_nobody_knows_is_an_error():
    with pytest.raises(InputError, match="`cache` nowhere://x cannot be reached"):
        place_at("nowhere://x")


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr(plan_module, "SMALLEST_SHARD_BYTES", 60_000)
    monkeypatch.setattr(sampler_module, "MOST_SHARDS_MIXED", 2)


def _train(cache, source=None, local_disk="50GB", count=150):
    module = ActivationDataModule(
        cache, source, "resid.1", batch_size=64, shuffle_rows=2048, local_disk=local_disk
    )
    torch.manual_seed(1)
    module.prepare_data()
    module.setup()
    loader, found = module.train_dataloader(), []
    while len(found) < count:
        found += [batch.x for _, batch in zip(range(count - len(found)), loader, strict=False)]
    module.teardown("fit")
    return module, found


def _check_remote(url, tiny_source, tmp_path):
    """Harvest to a URL, verify, train from it with a bound on the local copies."""
    local, expected = _train(str(tmp_path / "local"), tiny_source)
    remote = harvest(tiny_source, url)
    assert remote.manifest["shards"] == local.cache.manifest["shards"]
    remote.verify()
    shutil.rmtree(remote.place.fetched)
    largest = max(entry["bytes"] for entry in remote.manifest["shards"])
    module, found = _train(url, None, 4 * largest)
    assert all(map(torch.equal, found, expected))
    copies = sum(p.stat().st_size for p in module.cache.place.fetched.glob("shard*"))
    assert copies <= 5 * largest < sum(entry["bytes"] for entry in remote.manifest["shards"])
    x = [torch.cat([b.x for b in c.batches("held_out", "resid.3", 64)]) for c in (remote, local.cache)]
    assert torch.equal(*x)
    torch.testing.assert_close(remote.moments("resid.3").second, local.cache.moments("resid.3").second)


def test_a_cache_behind_a_url_gives_the_same_batches(tiny_source, tmp_path, small_shards):
    _check_remote(f"memory://{uuid.uuid4()}/cache", tiny_source, tmp_path)


def test_harvest_to_a_url_continues_where_it_was_interrupted(
    tiny_source, tmp_path, small_shards, monkeypatch
):
    writer, calls = ShardWriter, []
    real = writer.write

    def dies(self, *args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, *args)

    url = f"memory://{uuid.uuid4()}/cache"
    monkeypatch.setattr(writer, "write", dies)
    with pytest.raises(KeyboardInterrupt):
        harvest(tiny_source, url)
    with pytest.raises(InputError, match="is not finished"):
        ActivationCache(url)
    assert harvest(tiny_source, url).manifest["shards"] == harvest(tiny_source, tmp_path).manifest["shards"]
    n_shards = len(harvest(tiny_source, tmp_path).manifest["shards"])
    assert len(calls) == 2 * n_shards + 1  # each once here, once there, and the one that was interrupted


def test_a_new_cache_at_an_old_url_is_not_mixed_with_old_copies(tiny_source, tmp_path, small_shards):
    url = f"memory://{uuid.uuid4()}/cache"
    first = next(harvest(tiny_source, url).batches("held_out", "resid.1", 64)).x
    place = place_at(url)
    for name in place.sizes():
        place.remove(name)
    other = dataclasses.replace(tiny_source, hookpoints=["resid.1", "resid.2"])
    assert torch.equal(next(harvest(other, url).batches("held_out", "resid.1", 64)).x, first)
    assert ActivationCache(url).hookpoints == ["resid.1", "resid.2"]
    ActivationCache(url).verify()


def test_a_harvest_to_an_old_url_does_not_read_old_tokens(tiny_source, tmp_path, small_shards):
    url = f"memory://{uuid.uuid4()}/cache"
    harvest(tiny_source, url)
    place = place_at(url)
    stale = {path.name: path.read_bytes() for path in place.fetched.glob("sequences*")}
    for name in place.sizes():
        place.remove(name)
    other = tmp_path / "other.txt"
    other.write_text(Path(tiny_source.dataset).read_text().replace("red", "old").replace("sea", "mud"))
    for name, data in stale.items():
        (place.fetched / name).write_bytes(data)
    source = dataclasses.replace(tiny_source, dataset=str(other))
    remote, local = harvest(source, url), harvest(source, tmp_path / "local")
    assert remote.manifest["shards"] == local.manifest["shards"] and stale


def test_a_rolling_cache_cannot_lie_behind_a_url(tiny_source, small_shards):
    source = dataclasses.replace(tiny_source, disk=900_000)
    with pytest.raises(InputError, match="`disk` bounds a cache on this machine"):
        harvest(source, f"memory://{uuid.uuid4()}/cache")


@pytest.fixture(scope="module")
def s3():
    """An S3 server on loopback."""
    pytest.importorskip("s3fs", reason="the extra s3 is not installed")
    pytest.importorskip("moto.server", reason="moto is not installed")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    address = f"http://127.0.0.1:{port}"
    environment = {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
        "AWS_ENDPOINT_URL": address,
    }
    server = subprocess.Popen(
        [str(Path(sys.executable).with_name("moto_server")), "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | environment,
    )
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        for _ in range(1200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        import fsspec

        fsspec.filesystem("s3").mkdir("sae-test")
        yield "s3://sae-test"
    server.kill()
    server.wait()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_cache_in_s3_gives_the_same_batches(s3, tiny_source, tmp_path, small_shards):
    _check_remote(f"{s3}/caches/tiny", tiny_source, tmp_path)
    assert json.loads(place_at(f"{s3}/caches/tiny").read("manifest.json"))["finished"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_bucket_without_a_cache_is_an_error(s3):
    with pytest.raises(InputError, match="is not an activation cache"):
        ActivationCache(f"{s3}/nothing")
