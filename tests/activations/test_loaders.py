"""Loaders: batches are the sampler's, resume exactly, and need no more memory for a larger cache."""

import subprocess
import sys
import threading
from collections import Counter

import pytest
import torch

from sae.activations import ActivationCache, harvest
from sae.activations import sampler as sampler_module
from sae.activations.cache import plan as plan_module
from sae.activations.cache.supply import Bounded
from sae.activations.loaders import RowsOf, TrainLoader
from sae.activations.ranks import ALONE, Ranks
from sae.errors import InputError


@pytest.fixture(scope="module")
def cache(tmp_path_factory, tiny_source):
    """Several shards, several windows."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan_module, "SMALLEST_SHARD_BYTES", 60_000)
        return harvest(tiny_source, tmp_path_factory.mktemp("loaders"))


@pytest.fixture(autouse=True)
def several_windows(monkeypatch):
    monkeypatch.setattr(sampler_module, "MOST_SHARDS_MIXED", 3)


def _loader(cache, batch_size=64, seed=0, ranks=ALONE, **options):
    rows = RowsOf("resid.1", 16, torch.float32)
    return TrainLoader(cache.shards("train"), rows, batch_size, seed, ranks, rows_per_context=32, **options)


def _stream(loader, count):
    found = []
    while len(found) < count:
        found += [batch.x for batch, _ in zip(loader, range(count - len(found)), strict=False)]
    return found


def test_batches_hold_train_rows_each_once_per_pass(cache):
    loader = _loader(cache)
    assert loader._sampler.windows_per_pass > 2
    rows = torch.cat([batch.x for batch in loader])
    cached = torch.cat([b.x for b in cache.batches("train", "resid.1", 512)])
    assert len(rows) == len(cached) // 64 * 64
    given, there = (Counter(row.numpy().tobytes() for row in x) for x in (rows, cached))
    assert given <= there  # as multisets: equal prefixes make equal rows


def test_ranks_share_each_batch_without_overlap(cache):
    whole = next(iter(_loader(cache))).x
    parts = [next(iter(_loader(cache, ranks=Ranks(rank, 2)))).x for rank in (0, 1)]
    assert [len(part) for part in parts] == [32, 32]
    together, alone = (Counter(row.numpy().tobytes() for row in x) for x in (torch.cat(parts), whole))
    assert together == alone


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize("ranks", [ALONE, Ranks(1, 2)])
def test_loader_continues_where_it_was_saved_with_workers_and_ranks(cache, workers, ranks):
    expected = _stream(_loader(cache, ranks=ranks, workers=0), 200)
    broken = _loader(cache, ranks=ranks, workers=workers)
    iterator = iter(broken)
    for _ in range(70):
        next(iterator)
    state = broken.state_dict()
    next(iterator)  # what comes after the checkpoint is lost
    resumed = _loader(cache, seed=7, ranks=ranks, workers=workers)  # the saved seed counts
    resumed.load_state_dict(state)
    for ours, reference in zip(_stream(resumed, 130), expected[70:], strict=True):
        assert torch.equal(ours, reference)


def test_a_new_pass_has_a_new_order(cache):
    loader = _loader(cache)
    first = [batch.x for batch in loader]
    second = [batch.x for batch in loader]
    assert len(first) == len(second) == len(loader)
    assert not any(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_an_iteration_left_early_loses_nothing(cache):
    expected = _stream(_loader(cache, workers=0), 9)
    loader = _loader(cache, workers=2)
    found = []
    for _ in range(3):
        for _, batch in zip(range(3), loader, strict=False):
            found.append(batch.x)
    for ours, reference in zip(found, expected, strict=True):
        assert torch.equal(ours, reference)


def test_a_position_of_another_batch_size_is_an_error(cache):
    state = _loader(cache).state_dict()
    with pytest.raises(InputError, match="saved with batch_size=64, here it is 32"):
        _loader(cache, batch_size=32).load_state_dict(state)


def test_many_workers_on_short_windows_do_not_wait_for_ever(cache, monkeypatch):
    monkeypatch.setattr(sampler_module, "MOST_SHARDS_MIXED", 1)
    expected = _stream(_loader(cache, batch_size=400, workers=0), 60)
    for _ in range(5):
        found = _stream(_loader(cache, batch_size=400, workers=4), 60)
        assert all(map(torch.equal, found, expected))


def test_past_shards_are_closed(cache):
    loader = _loader(ActivationCache(cache.location), workers=0)  # no other test's threads open its shards
    for batch in loader:
        del batch
        opened = sum(bool(shard._mapped) for shard in loader._shards)
        assert opened <= 2 * 3


def test_damaged_shard_ends_the_iteration_with_its_name(cache, tmp_path):
    import shutil

    folder = shutil.copytree(cache.location, tmp_path / "copy")
    path = folder / "shard-00003.safetensors"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))
    with pytest.raises(InputError, match=r"shard-00003.safetensors is damaged"):
        list(_loader(ActivationCache(folder)))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"batch_size": 63, "ranks": Ranks(0, 2)}, "`batch_size`=63 must be a multiple of the 2 ranks"),
        ({"workers": -1}, "`workers` must be at least 0"),
        ({"shuffle_rows": 7}, "`shuffle_rows` must be at least 2,048"),
    ],
)
def test_options_out_of_range_are_errors(cache, options, match):
    with pytest.raises(InputError, match=match):
        _loader(cache, **options)


class _Shelf(Bounded):
    """A bounded folder of which every move is known; nothing is really moved."""

    def __init__(self, shards, limit, ranks=ALONE, there=None, lock=None):
        self.limit, self.ranks = limit, ranks
        self.there = set() if there is None else there
        self.lock = lock or threading.Lock()
        self.most, self.brought, self._sizes = 0, [], {s.file: s.n_bytes for s in shards}

    def is_there(self, shard):
        with self.lock:
            return shard.file in self.there

    def bring(self, shard):
        with self.lock:
            if shard.file not in self.there:
                self.brought.append(shard.file)
                self.there.add(shard.file)
            self.most = max(self.most, sum(self._sizes[file] for file in self.there))

    def remove(self, shard):
        with self.lock:
            self.there.discard(shard.file)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_bounded_folder_gives_the_same_batches_and_keeps_its_bound(cache, workers):
    shards = cache.shards("train")
    shelf = _Shelf(shards, 6 * max(s.n_bytes for s in shards))
    loader = _loader(cache, workers=workers, bounded=shelf)
    count = 3 * len(loader)
    for ours, reference in zip(_stream(loader, count), _stream(_loader(cache), count), strict=True):
        assert torch.equal(ours, reference)
    loader.close()
    assert shelf.most <= shelf.limit < sum(s.n_bytes for s in shards)
    assert len(shelf.brought) > len(shards), "a pass after the first one needs removed shards again"


def test_shards_of_an_earlier_pass_do_not_keep_the_next_ones_out(cache):
    """The folder is full of shards that a later window needs, at every step that a training may start at."""
    shards = cache.shards("train")
    expected = _stream(_loader(cache), 400)
    for begin in range(0, 380, 13):
        shelf = _Shelf(shards, 6 * max(s.n_bytes for s in shards))
        shelf.there = {s.file for s in shards[begin % 5 :: 2][:6]}
        loader = _loader(cache, bounded=shelf)
        loader.load_state_dict({"step": begin, "seed": 0})
        for ours, reference in zip(_stream(loader, 20), expected[begin:], strict=False):
            assert torch.equal(ours, reference)
        loader.close()
        assert shelf.most <= shelf.limit


def test_a_folder_that_holds_everything_is_filled_once(cache):
    shards = cache.shards("train")
    shelf = _Shelf(shards, sum(s.n_bytes for s in shards))
    loader = _loader(cache, bounded=shelf)
    _stream(loader, 2 * len(loader))
    loader.close()
    assert sorted(shelf.brought) == sorted(s.file for s in shards)


def test_ranks_that_share_a_folder_each_bring_their_part(cache):
    shards = cache.shards("train")
    there, lock = set(), threading.Lock()
    limit = 7 * max(s.n_bytes for s in shards)
    shelves = [_Shelf(shards, limit, Ranks(rank, 2), there, lock) for rank in (0, 1)]
    loaders = [
        _loader(ActivationCache(cache.location), ranks=Ranks(r, 2), bounded=shelves[r]) for r in (0, 1)
    ]
    found, together = [[], []], threading.Barrier(2, timeout=30)

    def train(rank):
        for _ in range(3):
            for batch in loaders[rank]:
                found[rank].append(batch.x)
                together.wait()  # in step, as ranks that train together are

    threads = [threading.Thread(target=train, args=(rank,), daemon=True) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for rank in (0, 1):
        expected = _stream(_loader(cache, ranks=Ranks(rank, 2)), 3 * len(loaders[0]))
        assert len(found[rank]) == len(expected)
        assert all(torch.equal(*pair) for pair in zip(found[rank], expected, strict=True))
    for loader in loaders:
        loader.close()
    brought = [set(shelf.brought) for shelf in shelves]
    assert brought[0] and brought[1] and not brought[0] & brought[1]
    assert max(shelf.most for shelf in shelves) <= limit


def test_a_bound_that_does_not_hold_two_windows_is_an_error(cache):
    shards = cache.shards("train")
    with pytest.raises(InputError, match=r"`disk` must hold the shards that are read side by side.* got"):
        _loader(cache, bounded=_Shelf(shards, 5 * min(s.n_bytes for s in shards)))


_READ_WITHIN = """
import resource, sys, torch
from sae.activations import ActivationCache
from sae.activations.loaders import RowsOf, TrainLoader
import sae.activations.sampler as sampler
sampler.MOST_SHARDS_MIXED = 2
torch.set_num_threads(1)
cache = ActivationCache(sys.argv[1])
loader = TrainLoader(cache.shards("train"), RowsOf("acts", 64, torch.float32), 256, 0)
next(iter(loader))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
limit = used + 160 * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
total = sum(batch.x.sum().item() for batch in loader)
for batch in cache.batches("train", "acts", 1024):
    total += batch.x.sum().item()
print("read", total == total)
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space")
def test_a_cache_larger_than_the_memory_allowed_is_read(tmp_path, monkeypatch):
    from sae.activations.exchange.imported import import_rows

    monkeypatch.setattr(plan_module, "SHARD_BYTES", 16 * 2**20)
    import_rows(torch.randn(1_400_000, 64), tmp_path / "cache")  # 360 MB
    done = subprocess.run(
        [sys.executable, "-c", _READ_WITHIN, str(tmp_path / "cache")], capture_output=True, text=True
    )
    assert done.returncode == 0 and "read True" in done.stdout, done.stderr[-2000:]
