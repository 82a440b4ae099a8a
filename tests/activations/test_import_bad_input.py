"""What cannot be imported is refused with the reason."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sae.activations import import_activations, import_rows
from sae.activations.exchange.array_files import open_array
from sae.activations.exchange.exported import export_activations
from sae.errors import InputError

N, D = 3000, 6
pytestmark = pytest.mark.usefixtures("small_shards")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_is_named_or_left_out(x, tmp_path, bad, exported):
    x[17, 1] = x[2999, 0] = bad
    np.save(tmp_path / "x.npy", x.numpy())
    with pytest.raises(InputError, match=r"x.npy: row (17|2999) is not finite; `non_finite` skip"):
        import_activations(tmp_path / "x.npy", tmp_path / "cache")
    cache = import_activations(tmp_path / "x.npy", tmp_path / "skipped", non_finite="skip")
    assert cache.manifest["rows_skipped"] == 2 and cache.n_rows("train") == 2849
    good = [i for i in range(N) if i not in (17, 2999)]
    assert np.array_equal(exported(cache)["x"], x[good].numpy())
    torch.testing.assert_close(cache.moments("acts").mean, x[good][:2849].double().mean(0))


def test_rows_that_a_dtype_cannot_hold_are_named(x, tmp_path):
    x[17, 1] = 1e5
    with pytest.raises(InputError, match="row 17 is not finite as float16.*65504; set `dtype` to float32"):
        import_activations(x, tmp_path / "cache", dtype="float16")
    with pytest.raises(InputError, match=r"row 17 .*\(sequence 0, position 17\)"):
        import_activations(x, tmp_path / "c", dtype="float16", token_ids=torch.zeros(N, dtype=torch.int64))


def test_large_values_whose_sum_overflows_are_no_error(tmp_path, exported):
    x = torch.full((300, D), 3e38)
    assert np.array_equal(exported(import_rows(x, tmp_path / "cache"))["x"], x.numpy())


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"activations": torch.zeros(10)}, r"must be \(rows, d_model\) or .* got \(10,\)"),
        ({"activations": torch.zeros(2, 3, 4, 5)}, "must be"),
        ({"activations": torch.zeros(0, 4)}, "none of them 0"),
        ({"activations": torch.zeros(10, 4, dtype=torch.int32)}, "must hold floats, got int32"),
        ({"activations": np.array([["a"]])}, "no number that torch knows"),
        ({"token_ids": torch.zeros(99, dtype=torch.int64)}, r"of shape \(100,\) .* got \(99,\)"),
        ({"token_ids": torch.zeros(100)}, "`token_ids` must be integers, got float32"),
        ({"token_ids": torch.full((100,), -1), "context_length": 10}, "must lie in .*-1 to -1"),
        ({"lengths": torch.tensor([50, 49])}, "must add up to the number of rows, 100, got 99 from 2"),
        ({"lengths": torch.tensor([100, 0])}, "at least 1, got 0 at 1"),
        ({"lengths": torch.tensor([60.0, 40.0])}, "`lengths` must be integers"),
        ({"lengths": torch.tensor([100])}, "leaves no held-out sequences: there are 1"),
        ({"activations": torch.zeros(10, 10, 4), "lengths": torch.tensor([50, 50])}, "rows in one piece"),
        ({"held_out": 1.5}, "`held_out` must lie between 0 and 1, got 1.5"),
        ({"held_out": 0.001}, "leaves no held-out rows: there are 100"),
        ({"held_out": 0.999}, "leaves no train rows"),
        ({"context_length": 0}, "`context_length` must be at least 1"),
        ({"hookpoint": "position"}, "`hookpoint` must not be 'position'"),
        ({"activations": {"a": torch.zeros(10, 3), "b": torch.zeros(11, 3)}}, "must have the same rows"),
        ({"activations": [torch.zeros(10, 3), torch.zeros(10, 4)]}, "differ in their first axis only"),
        ({"activations": [torch.zeros(10, 3), torch.zeros(10, 3).half()]}, "differ in their first axis only"),
        ({"activations": "nowhere.npy"}, "there is no file nowhere.npy"),
        ({"activations": ["a.npy", "b.pt"]}, "files of one kind, got .npy, .pt"),
        ({"activations": []}, "files of one kind, got none"),
    ],
)
def test_bad_input_is_refused_before_anything_is_written(tmp_path, arguments, match):
    arguments = {"activations": torch.zeros(100, 4), "held_out": 0.1} | arguments
    with pytest.raises(InputError, match=match):
        import_activations(location=tmp_path / "cache", **arguments)
    assert not list((tmp_path / "cache").glob("shard*"))


def _pickled(path):
    torch.save({"x": torch.zeros(10, 3), "path": Path("somewhere")}, path)


def _cut(path):
    np.save(path, np.zeros((100, 3), np.float32))
    path.write_bytes(path.read_bytes()[:-5])


def _folder(path):
    path.mkdir()


@pytest.mark.parametrize(
    ("name", "make", "match"),
    [
        ("x.csv", lambda path: path.write_text("1,2"), "suffix must be one of .npy"),
        ("x.npy", lambda path: path.write_text("hello"), "is not a .npy array"),
        ("x.npy", lambda path: np.save(path, np.array([{}])), "holds Python objects"),
        ("x.npy", lambda path: np.save(path, np.zeros(3, "V2")), "no number that torch knows"),
        ("x.npy", lambda path: np.save(path, 3.0), "single number"),
        ("x.npy", _cut, "cut short"),
        ("x.safetensors", lambda path: path.write_bytes(b"12345678{}"), "is not a safetensors file"),
        (
            "x.safetensors",
            lambda path: save_file({"a": torch.zeros(2), "b": torch.zeros(2)}, path),
            "holds 2 tensors: a, b; say which one with `tensor`",
        ),
        ("x.pt", _pickled, "holds more than tensors.*could run any code"),
        ("x.pt", lambda path: path.write_bytes(b"nothing"), "cannot be read|holds more than tensors"),
        ("x.pt", lambda path: torch.save({"step": 1}, path), "holds 0 tensors: none"),
        ("x.pt", lambda path: torch.save(torch.zeros(3, 3).to_sparse(), path), "must be a dense tensor"),
        ("x", _folder, "is a folder, but not one of Hugging Face"),
    ],
)
def test_files_that_hold_no_array_are_refused(tmp_path, name, make, match):
    make(tmp_path / name)
    with pytest.raises(InputError, match=match):
        import_activations(tmp_path / name, tmp_path / "cache")


def test_a_tensor_that_is_not_there_is_refused_with_those_that_are(tmp_path, write_saelens):
    save_file({"a": torch.zeros(2, 2), "b": torch.zeros(2, 2)}, tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="'c' is not in .*; it has a, b"):
        open_array(tmp_path / "x.safetensors", "c")
    torch.save({"a": torch.zeros(2, 2)}, tmp_path / "x.pt")
    with pytest.raises(InputError, match="'c' is not in .*; it has a"):
        open_array(tmp_path / "x.pt", "c")
    write_saelens(tmp_path / "saelens", torch.zeros(4, 2, 3), torch.zeros(4, 2, dtype=torch.int64))
    with pytest.raises(InputError, match=r"'c' is not a column .*blocks.1.hook_resid_post \(Array2D"):
        open_array(tmp_path / "saelens", "c")


def test_exports_replace_nothing(x, tmp_path):
    cache = import_rows(x, tmp_path / "cache")
    (tmp_path / "x.tokens.npy").write_text("")
    with pytest.raises(InputError, match="x.tokens.npy exists"):
        export_activations(cache, tmp_path / "x.npy")
    with pytest.raises(InputError, match="must be a .npy file"):
        export_activations(cache, tmp_path / "x.pt")
    with pytest.raises(InputError, match="there is no folder"):
        export_activations(cache, tmp_path / "nowhere" / "x.npy")
