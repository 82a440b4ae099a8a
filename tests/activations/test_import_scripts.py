"""The scripts that import and export, and the folders that SAELens writes."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from sae.activations import ActivationCache, import_activations
from sae.activations.exchange.array_files import open_array
from sae.errors import InputError

N, D = 3000, 6
pytestmark = pytest.mark.usefixtures("small_shards")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_folder_of_saelens_comes_back_bit_for_bit(tmp_path, dtype, exported, write_saelens):
    x, ids = torch.randn(70, 16, D).to(dtype), torch.randint(0, 100, (70, 16))
    folder = write_saelens(tmp_path / "saelens", x, ids)
    cache = import_activations(
        {"resid.2": open_array(folder)}, tmp_path / "cache", token_ids=open_array(folder, "token_ids")
    )
    found = exported(cache)
    assert found["x"].dtype == x.numpy().dtype
    assert np.array_equal(found["x"].reshape(x.shape), x.numpy())
    assert np.array_equal(found["tokens"].reshape(ids.shape), ids.numpy())


def test_a_folder_whose_arrays_differ_in_length_is_refused(tmp_path):
    features = datasets.Features({"acts": datasets.Array2D((4, 2), "float32")})
    made = datasets.Dataset.from_dict({"acts": [np.zeros((4, 2), np.float32)] * 5}, features=features)
    made.save_to_disk(str(tmp_path / "good"))
    import_activations(tmp_path / "good", tmp_path / "cache", held_out=0.4)
    ragged = datasets.Features({"acts": datasets.Array2D((None, 2), "float32")})
    rows = {"acts": [np.zeros((n, 2), np.float32) for n in (3, 4)]}
    datasets.Dataset.from_dict(rows, features=ragged).save_to_disk(str(tmp_path / "ragged"))
    with pytest.raises(InputError, match=r"0 columns of float arrays of one shape.*acts \(Array2D"):
        import_activations(tmp_path / "ragged", tmp_path / "cache")


SCRIPTS = Path(__file__).parents[2] / "scripts"


def _run(monkeypatch, script, *arguments):
    """Runs a script as a command would; returns its exit status."""
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    try:
        runpy.run_path(str(SCRIPTS / script), run_name="__main__")
    except SystemExit as error:
        return error.code
    return 0


def test_scripts_import_and_export(x, tmp_path, monkeypatch, capsys, lengths):
    ids = torch.randint(0, 100, (N,))
    for name, array in (("ids", ids), ("lengths", lengths), ("x", x.double())):
        np.save(tmp_path / f"{name}.npy", array.numpy())
    arguments = [tmp_path / "x.npy", "--cache", tmp_path / "cache", "--tokens", tmp_path / "ids.npy"]
    arguments += ["--lengths", tmp_path / "lengths.npy", "--held-out", 0.2, "--hookpoint", "mlp.3"]
    assert _run(monkeypatch, "import_activations.py", *arguments) == 0
    said = capsys.readouterr().out
    assert (
        "is float64; it is stored as float32" in said and "held-out rows of mlp.3, float32; finished" in said
    )
    assert _run(monkeypatch, "import_activations.py", *arguments) == 0  # again
    export = [tmp_path / "cache", "--out", tmp_path / "out.npy"]
    assert _run(monkeypatch, "export_activations.py", *export) == 0
    assert np.array_equal(np.load(tmp_path / "out.npy"), x.numpy())
    assert np.array_equal(np.load(tmp_path / "out.tokens.npy"), ids.numpy())
    assert _run(monkeypatch, "export_activations.py", *export) == 2
    assert "out.npy exists" in capsys.readouterr().err


def test_the_import_script_takes_several_tensors_as_hookpoints(x, tmp_path, monkeypatch, capsys):
    save_file({"a": x, "b": x * 2}, tmp_path / "x.safetensors")
    command = ["import_activations.py", tmp_path / "x.safetensors", "--cache", tmp_path / "cache"]
    assert _run(monkeypatch, *command) == 2
    assert "holds 2 tensors: a, b" in capsys.readouterr().err
    assert _run(monkeypatch, *command, "--tensor", "a", "--tensor", "b", "--hookpoint", "c") == 2
    assert "1 names for 2 tensors" in capsys.readouterr().err
    assert _run(monkeypatch, *command, "--tensor", "a", "--tensor", "b", "--dtype", "bfloat16") == 0
    cache = ActivationCache(tmp_path / "cache")
    assert cache.hookpoints == ["a", "b"]
    out = ["--hookpoint", "b", "--split", "held_out", "--out", tmp_path / "b.npy"]
    capsys.readouterr()
    assert _run(monkeypatch, "export_activations.py", tmp_path / "cache", *out) == 0
    assert "float32 is written" in capsys.readouterr().out
    assert np.array_equal(np.load(tmp_path / "b.npy"), (x[-150:] * 2).bfloat16().float().numpy())


def test_the_import_script_knows_the_folders_ofwrite_saelens(tmp_path, monkeypatch, exported, write_saelens):
    x, ids = torch.randn(50, 16, D), torch.randint(0, 100, (50, 16))
    folder = write_saelens(tmp_path / "saelens", x, ids)
    assert _run(monkeypatch, "import_activations.py", folder, "--cache", tmp_path / "cache") == 0
    cache = ActivationCache(tmp_path / "cache")
    assert cache.hookpoints == ["resid.2"] and torch.equal(cache.token_ids.long(), ids)
    assert np.array_equal(exported(cache)["x"].reshape(x.shape), x.numpy())


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["nowhere.npy"], "there is no file nowhere.npy"),
        (["{x}", "--lengths", "nowhere.npy"], "there is no file nowhere.npy"),
        (["{x}", "--held-out", "2"], "`held_out` must lie between 0 and 1, got 2.0"),
        (["{x}", "--tokens", "{x}"], "`token_ids` must be integers"),
        (["{x}", "--tensor", "a"], "holds one array, without a name"),
        (["{x}", "--model", "demo"], "`model` needs `token_ids`"),
        (["{nan}"], "row 3 is not finite"),
    ],
)
def test_the_import_script_says_what_is_wrong_in_one_line(tmp_path, monkeypatch, capsys, arguments, match):
    x = np.zeros((100, 4), np.float32)
    np.save(tmp_path / "x.npy", x)
    x[3, 2] = np.nan
    np.save(tmp_path / "nan.npy", x)
    arguments = [a.format(x=tmp_path / "x.npy", nan=tmp_path / "nan.npy") for a in arguments]
    assert _run(monkeypatch, "import_activations.py", *arguments, "--cache", tmp_path / "cache") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("error: ") and match in last
