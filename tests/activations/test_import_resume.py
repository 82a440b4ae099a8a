"""Imports that are run again, interrupted, or larger than memory."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sae.activations import ActivationCache, import_activations, import_rows
from sae.activations.cache import writer as writer_module
from sae.errors import InputError

N, D = 3000, 6
pytestmark = pytest.mark.usefixtures("small_shards")


def _bytes(folder):
    return {f.name: f.read_bytes() for f in folder.iterdir() if f.suffix == ".safetensors"}


class _Killed(BaseException):
    pass


@pytest.mark.parametrize("n_written", [0, 1, 4])
def test_an_interrupted_import_goes_on_to_the_same_bytes(x, tmp_path, monkeypatch, n_written, lengths):
    ids = torch.randint(0, 100, (N,))
    arguments = {"token_ids": ids, "lengths": lengths, "held_out": 0.2}
    import_activations(x, tmp_path / "unbroken", **arguments)
    real, written = writer_module.write_tensors, []

    def write(place, name, tensors, *rest):
        if name.startswith("shard"):
            if len(written) == n_written:
                raise _Killed
            written.append(name)
        return real(place, name, tensors, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(writer_module, "write_tensors", write)
        with pytest.raises(_Killed):
            import_activations(x, tmp_path / "broken", **arguments)
    shards = {f.name: f.stat().st_mtime_ns for f in (tmp_path / "broken").glob("shard*.safetensors")}
    assert len(shards) == n_written
    with pytest.raises(InputError, match="not finished"):
        ActivationCache(tmp_path / "broken")
    cache = import_activations(x, tmp_path / "broken", **arguments)
    assert all((tmp_path / "broken" / name).stat().st_mtime_ns == time for name, time in shards.items())
    assert _bytes(tmp_path / "broken") == _bytes(tmp_path / "unbroken")
    cache.verify()


def test_a_finished_import_is_left_alone_and_mended_where_shards_are_lost(x, tmp_path):
    cache = import_rows(x, tmp_path / "cache")
    before = _bytes(tmp_path / "cache")
    changed = (tmp_path / "cache" / "manifest.json").stat().st_mtime_ns
    import_rows(x, tmp_path / "cache")
    assert (tmp_path / "cache" / "manifest.json").stat().st_mtime_ns == changed
    (tmp_path / "cache" / cache.shards("train")[1].file).unlink()
    import_rows(x, tmp_path / "cache").verify()
    assert _bytes(tmp_path / "cache") == before


def test_another_import_into_the_same_folder_is_refused(x, tmp_path):
    np.save(tmp_path / "x.npy", x.numpy())
    import_activations(tmp_path / "x.npy", tmp_path / "cache")
    with pytest.raises(InputError, match="another import.*differs in held_out"):
        import_activations(tmp_path / "x.npy", tmp_path / "cache", held_out=0.2)
    os.utime(tmp_path / "x.npy", ns=(1, 1))
    with pytest.raises(InputError, match="another import.*differs in activations"):
        import_activations(tmp_path / "x.npy", tmp_path / "cache")
    import_rows(x, tmp_path / "rows")
    x[5, 2] += 1
    with pytest.raises(InputError, match="another import"):
        import_rows(x, tmp_path / "rows")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("")
    with pytest.raises(InputError, match="is not empty"):
        import_rows(x, tmp_path / "full")


def test_a_harvested_cache_is_not_replaced(tiny_cache):
    with pytest.raises(InputError, match="a cache that was not imported"):
        import_rows(torch.randn(100, 4), tiny_cache.location)


def test_too_small_a_disk_is_noticed_before_anything_is_written(x, tmp_path, monkeypatch):
    from sae.activations.cache.places import LocalPlace

    monkeypatch.setattr(LocalPlace, "free_bytes", lambda self: 1000)
    with pytest.raises(InputError, match="more than is free"):
        import_rows(x, tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("shard*"))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("kind", ["npy", "safetensors", "whole"])
def test_memory_stays_far_below_the_size_of_the_file(tmp_path, kind):
    """300 MB in, 300 MB out, in a process that grows by less than half of that; an array in memory shows."""
    program = """
        import sys
        import numpy as np, torch
        from sae.activations import import_activations
        from sae.activations.cache import plan
        plan.SHARD_BYTES = plan.SMALLEST_SHARD_BYTES = 8 * 2**20
        import_activations(torch.randn(2000, 128), sys.argv[2] + "-warm")
        # not ru_maxrss, which a child has from its parent
        peak = lambda: int(open("/proc/self/status").read().split("VmHWM:")[1].split()[0])
        before = peak()
        import_activations(np.load(sys.argv[1]) if sys.argv[3] == "whole" else sys.argv[1], sys.argv[2])
        print(peak() - before)
    """
    x = np.lib.format.open_memmap(tmp_path / "x.npy", mode="w+", dtype=np.float32, shape=(600_000, 128))
    x[:] = np.random.default_rng(0).standard_normal(128, np.float32)
    x.flush()
    file = tmp_path / "x.npy"
    if kind == "safetensors":
        file = tmp_path / "x.safetensors"
        save_file({"x": torch.from_numpy(x)}, file)
    assert file.stat().st_size > 300e6
    command = [sys.executable, "-c", textwrap.dedent(program), str(file), str(tmp_path / "cache"), kind]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    grown = int(done.stdout.splitlines()[-1]) * 1024
    print(f"{kind}: grew by {grown / 1e6:.0f} MB for a file of {file.stat().st_size / 1e6:.0f} MB")
    assert grown > 300e6 if kind == "whole" else grown < 150e6  # the first: so the gauge can be believed
    assert ActivationCache(tmp_path / "cache").n_rows("train") == 570_000
