"""Which kernel serves what, what is said where none does, and that the compiled ones are safe."""

import ctypes
import os
import shutil
import subprocess
import sys
import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sae.errors import InputError
from sae.ops import bags, kernels
from sae.ops.kernels import build, on_cpu
from sae.ops.largest import largest
from sae.ops.selection import top_k
from sae.ops.sparse import sorted_by_latent

pytestmark = [
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="its kernels are what is tested"),
    pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="there is no C compiler"),
]


def test_where_there_is_a_compiler_the_kernels_are_what_serves():
    on_cpu.library()
    assert kernels.kernel("largest", torch.ones(1)) is on_cpu.largest


@pytest.fixture
def anew():
    """As in a fresh process, nothing compiled, nothing said; and back to that afterwards."""

    def forget():
        for remembered in (kernels._say_once, kernels._on_gpu, kernels._on_cpu, on_cpu.library):
            remembered.cache_clear()

    forget()
    yield
    forget()


def _said(match, tensor, name="sum_rows"):
    with pytest.warns(UserWarning, match=match):
        assert kernels.kernel(name, tensor) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once
        assert kernels.kernel(name, tensor) is None


def _on_gpu(dtype):
    with FakeTensorMode():
        return torch.empty(2, 3, dtype=dtype, device="cuda")


def test_a_dtype_without_kernel_is_said_once(anew):
    _said("no kernel for torch.float64 on a GPU; torch's own operations are used", _on_gpu(torch.float64))
    _said("no kernel for torch.bfloat16 on a CPU; torch's own", torch.ones(2, dtype=torch.bfloat16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernels.kernel("sum_rows", torch.ones(2, dtype=torch.float64)) is None


def test_a_gpu_without_triton_is_said_once(anew, monkeypatch):
    monkeypatch.setitem(sys.modules, "sae.ops.kernels.on_gpu", None)
    monkeypatch.delattr("sae.ops.kernels.on_gpu", raising=False)
    _said("Triton is missing .* torch's own operations are used", _on_gpu(torch.float32))


def test_no_compiler_is_said_once_and_torch_does_the_same(anew, monkeypatch):
    matrix = torch.randn(3, 500)
    compiled = largest(matrix, 5).values.sort().values
    for remembered in (kernels._on_cpu, on_cpu.library):
        remembered.cache_clear()
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    _said("no C compiler .* torch's own operations are used, which are slower", torch.ones(2))
    assert torch.equal(largest(matrix, 5).values.sort().values, compiled)


def test_a_compiler_that_fails_is_quoted(anew, monkeypatch, tmp_path):
    compiler = tmp_path / "mycc"
    compiler.write_text("#!/bin/sh\necho first >&2\necho 'no such flag: -O3' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CC", str(compiler))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    _said(r"mycc cannot compile the kernels \(no such flag: -O3\)", torch.ones(2))
    assert list((tmp_path / "cache" / "sae").iterdir()) == []  # nothing half-written


SOURCE = "int answer(void) { return 42; }"


def test_what_is_compiled_is_kept_and_a_torn_file_made_again(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "some.c").write_text(SOURCE)
    assert build.built(tmp_path / "some.c").answer() == 42
    known, made = sorted((tmp_path / "sae").iterdir(), key=lambda path: path.suffix)
    whole = made.read_bytes()
    for cut in (0, 100, 4096, len(whole) // 2, len(whole) - 1):
        elsewhere = tmp_path / f"elsewhere{cut}"  # the library that is loaded now stays as it is
        (elsewhere / "sae").mkdir(parents=True)
        (elsewhere / "sae" / made.name).write_bytes(whole[:cut])
        (elsewhere / "sae" / made.with_suffix(".sha256").name).write_bytes(known.read_bytes())
        monkeypatch.setenv("XDG_CACHE_HOME", str(elsewhere))
        assert build.built(tmp_path / "some.c").answer() == 42
        assert (elsewhere / "sae" / made.name).stat().st_size > cut
    before = made.stat().st_mtime_ns
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.built(tmp_path / "some.c")
    assert made.stat().st_mtime_ns == before
    (tmp_path / "some.c").write_text(SOURCE.replace("42", "43"))
    assert build.built(tmp_path / "some.c").answer() == 43


def test_without_a_folder_to_keep_it_in_it_is_compiled_for_the_process(monkeypatch, tmp_path):
    (tmp_path / "some.c").write_text(SOURCE)
    (tmp_path / "taken").write_text("a file")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "taken"))
    assert isinstance(library := build.built(tmp_path / "some.c"), ctypes.CDLL) and library.answer() == 42


def test_a_folder_that_others_can_write_in_is_not_trusted(monkeypatch, tmp_path):
    (tmp_path / "some.c").write_text(SOURCE)
    (tmp_path / "sae").mkdir()
    (tmp_path / "sae").chmod(0o777)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert build.built(tmp_path / "some.c").answer() == 42
    assert list((tmp_path / "sae").iterdir()) == []


@pytest.mark.parametrize("k", [0, 9])
def test_more_than_there_are_cannot_be_chosen(k):
    with pytest.raises(InputError, match=rf"`k` must be in \[1, 8\], the width of the rows, got k={k}"):
        on_cpu.largest(torch.randn(2, 8), k)


def test_tensors_without_numbers_are_torchs():
    with FakeTensorMode():
        matrix, indices, offsets = torch.empty(4, 5), torch.zeros(6, dtype=torch.int64), torch.arange(0, 7, 2)
        assert bags.sum_rows(torch.empty(6), indices, offsets, matrix).shape == (3, 5)


@pytest.mark.parametrize("wrong", [-1, 4])
def test_indices_out_of_range_are_refused_before_anything_is_read_there(wrong):
    matrix, offsets = torch.randn(4, 40), torch.tensor([0, 1, 3])
    indices = torch.tensor([0, 3, wrong])
    with pytest.raises(InputError, match=r"`indices` must be in \[0, 4\)"):
        bags.sum_rows(torch.ones(3), indices, offsets, matrix)
    with pytest.raises(InputError, match=r"`indices` must be in \[0, 4\)"):
        bags.products(matrix[:2], indices, offsets, matrix)
    with pytest.raises(InputError, match=r"`indices` must be in \[0, 4\)"):
        on_cpu.by_latent(indices, offsets, 4)


def test_numbers_of_another_kind_are_refused_not_misread():
    code = top_k(torch.randn(3, 20), 2)
    with pytest.raises(TypeError, match="takes torch.int64 there, got torch.int32"):
        bags.sum_rows(code.values, code.indices.int(), code.row_offsets, torch.randn(20, 5))
    with pytest.raises(TypeError, match="takes torch.float32 there, got torch.float64"):
        bags.sum_rows(code.values.double(), code.indices, code.row_offsets, torch.randn(20, 5))


def test_any_number_of_threads_gives_the_same_bits():
    torch.manual_seed(0)
    pre_acts, W, x = torch.randn(300, 700), torch.randn(700, 77), torch.randn(300, 77)
    found = []
    threads = torch.get_num_threads()
    for n in (1, 2, 5):
        torch.set_num_threads(n)
        try:
            code = top_k(pre_acts, 9)
            order, rows, offsets = sorted_by_latent(code, 700)
            sums = bags.sum_rows(code.values, code.indices, code.row_offsets, W)
            dots = bags.products(x, code.indices, code.row_offsets, W)
            of_latents = bags.sum_rows(code.values[order], rows, offsets, x)
            found.append([*code[:3], order, rows, offsets, sums, dots, of_latents])
        finally:
            torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_entries_by_latent_are_those_of_a_stable_sort(with_kernels):
    code = top_k(torch.randn(50, 30), 4)
    compiled = sorted_by_latent(code, 30)
    with_kernels("off")
    for mine, torchs in zip(compiled, sorted_by_latent(code, 30), strict=True):
        assert torch.equal(mine, torchs.to(mine.dtype))


@pytest.mark.slow
def test_kernels_in_tritons_interpreter():
    """All tests of sparse products again, in a process where Triton interprets its kernels on the CPU."""
    pytest.importorskip("triton")
    files = ["tests/ops/test_bags.py", "tests/ops/test_sparse.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", *files]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
