"""Activations brought along: what comes out of the cache is what was in the files, whatever their kind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sae.activations import ActivationCache, import_activations, import_rows
from sae.activations.exchange.array_files import open_array
from sae.activations.exchange.exported import export_activations
from sae.errors import InputError

N, D = 3000, 6
pytestmark = pytest.mark.usefixtures("small_shards")


def _save(kind, x, path):
    """One file, or two halves of it, in the order to be joined."""
    halves = (x[: len(x) // 3], x[len(x) // 3 :])
    files = []
    for i, part in enumerate(halves if kind.startswith("two") else (x,)):
        file = path / f"part-{i}.{kind.rpartition(' ')[2]}"
        if file.suffix == ".npy":
            np.save(file, np.asfortranarray(part.numpy()) if "fortran" in kind else part.numpy())
            if "swapped" in kind:
                np.save(file, part.numpy().astype(part.numpy().dtype.newbyteorder(">")))
        elif file.suffix == ".safetensors":
            save_file({"acts": part.contiguous(), "other": torch.zeros(3)}, file)
        else:
            torch.save({"acts": part.clone(), "step": 3} if "dict" in kind else part.clone(), file)
        files.append(file)
    return files


KINDS = ["npy", "fortran npy", "swapped npy", "two npy", "safetensors", "two safetensors", "pt", "dict pt"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_rows_come_back_bit_for_bit_from_every_kind_of_file(x, tmp_path, kind, dtype, exported):
    x = x.to(dtype)
    files = _save(kind, x, tmp_path)
    array = open_array(files, "acts" if "safetensors" in kind else None)
    cache = import_activations(array, tmp_path / "cache", held_out=0.1)
    assert cache.manifest["dtype"] == str(dtype).removeprefix("torch.")
    assert len(cache.shards("train")) > 2
    found = exported(cache)
    assert list(found) == ["x"] and found["x"].dtype == x.numpy().dtype
    assert np.array_equal(found["x"], x.numpy())


@pytest.mark.parametrize("n", [2, 129, 1000, 1280, 2999])
@pytest.mark.parametrize("held_out", [0.3, 0.5])
def test_the_last_rows_are_held_out_and_the_others_mixed(tmp_path, n, held_out, exported):
    x = torch.randn(n, D)
    cache = import_rows(x, tmp_path / "cache", held_out=held_out)
    n_train = n - round(held_out * n)
    assert (cache.n_rows("train"), cache.n_rows("held_out")) == (n_train, n - n_train)
    held = torch.cat([b.x for b in cache.batches("held_out", "acts", 77)])
    train = [b for b in cache.batches("train", "acts", 77)]
    assert torch.equal(held, x[n_train:])
    assert all(b.sequence is None and b.position is None for b in train)
    order = load_file(tmp_path / "cache" / "order.safetensors")["order"]
    assert torch.equal(torch.cat([b.x for b in train]), x[order])
    assert n < 100 or not torch.equal(order, order.sort().values)
    moments = cache.moments("acts")
    exact = x[:n_train].double()
    torch.testing.assert_close(moments.mean, exact.mean(0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moments.second, exact.T @ exact / n_train, rtol=1e-12, atol=1e-12)
    for split, rows in (("train", x[:n_train]), ("held_out", x[n_train:])):
        assert np.array_equal(exported(cache, split=split)["x"], rows.numpy())
    cache.verify()


def test_neighbouring_rows_are_spread_over_their_shard(tmp_path):
    """Rows 0 to 127 do not lie together: every third of their shard has some."""
    import_rows(torch.randn(N, D), tmp_path / "cache")
    order = load_file(tmp_path / "cache" / "order.safetensors")["order"]
    cache = ActivationCache(tmp_path / "cache")
    for part in order.split([shard.rows for shard in cache.shards("train")]):
        for run in (part // 128).unique():
            at = (part // 128 == run).nonzero().squeeze(1)
            if len(at) == 128:
                assert (torch.histc(at.float(), 3, 0, len(part)) > 25).all()


@pytest.mark.parametrize("with_tokens", [True, False])
def test_sequences_of_any_length_come_back_with_their_tokens(x, tmp_path, with_tokens, exported, lengths):
    ids = torch.randint(0, 60_000, (N,))
    np.save(tmp_path / "x.npy", x.numpy())
    np.save(tmp_path / "ids.npy", ids.numpy().astype(np.uint16))
    np.save(tmp_path / "lengths.npy", lengths.numpy())
    cache = import_activations(
        tmp_path / "x.npy",
        tmp_path / "cache",
        token_ids=tmp_path / "ids.npy" if with_tokens else None,
        lengths=tmp_path / "lengths.npy",
        held_out=0.2,
    )
    n_held_out = round(0.2 * len(lengths))
    assert cache.manifest["splits"]["held_out"] == {
        "sequences": n_held_out,
        "rows": int(lengths[-n_held_out:].sum()),
    }
    found = exported(cache)
    sequence = torch.arange(len(lengths)).repeat_interleave(lengths)
    position = torch.cat([torch.arange(n) for n in lengths.tolist()])
    assert np.array_equal(found["x"], x.numpy())
    assert np.array_equal(found["sequence"], sequence.numpy())
    assert np.array_equal(found["position"], position.numpy())
    if not with_tokens:
        assert "tokens" not in found
        with pytest.raises(InputError, match="holds no token ids"):
            cache.sequences("token_ids")
        return
    assert np.array_equal(found["tokens"], ids.numpy())
    cached, documents = cache.sequences("cached"), cache.sequences("document_ids")
    assert cached is not None and documents is not None
    assert torch.equal(cached.sum(1), lengths) and torch.equal(cache.token_ids[cached].long(), ids)
    assert torch.equal(documents[:, 0], torch.arange(len(lengths)).int())
    for batch in cache.batches("train", "acts", 500):
        assert torch.equal(cache.token_ids[batch.sequence.long(), batch.position.long()].long(),
                           ids[_row_of(lengths, batch)])  # fmt: skip
        assert torch.equal(batch.x, x[_row_of(lengths, batch)])


def _row_of(lengths, batch):
    return (lengths.cumsum(0) - lengths)[batch.sequence.long()] + batch.position.long()


def test_token_ids_without_lengths_are_cut_into_contexts(x, tmp_path, exported):
    ids = torch.randint(0, 100, (N,))
    cache = import_activations(x, tmp_path / "cache", token_ids=ids, context_length=64)
    assert cache.token_ids.shape == (47, 64) and cache.manifest["context_length"] == 64
    found = exported(cache)
    assert np.array_equal(found["x"], x.numpy()) and np.array_equal(found["tokens"], ids.numpy())
    assert np.array_equal(found["position"], np.arange(N) % 64)


@pytest.mark.parametrize("with_tokens", [True, False])
@pytest.mark.parametrize("context", [1, 20])
def test_arrays_of_sequences_come_back(tmp_path, with_tokens, context, exported):
    x, ids = torch.randn(150, context, D), torch.randint(0, 100, (150, context))
    np.save(tmp_path / "x.npy", x.numpy())
    cache = import_activations(
        [tmp_path / "x.npy"], tmp_path / "cache", token_ids=ids if with_tokens else None, held_out=0.1
    )
    assert cache.manifest["splits"]["held_out"] == {"sequences": 15, "rows": 15 * context}
    found = exported(cache)
    assert np.array_equal(found["x"].reshape(x.shape), x.numpy())
    assert np.array_equal(found["sequence"].reshape(150, context)[:, 0], np.arange(150))
    assert ("tokens" in found) == with_tokens
    assert not with_tokens or np.array_equal(found["tokens"].reshape(ids.shape), ids.numpy())


def test_several_hookpoints_keep_their_rows_together(x, tmp_path, exported):
    cache = import_activations({"a": x, "b": x[:, :2] * 2}, tmp_path / "cache")
    assert cache.hookpoints == ["a", "b"] and cache.d_model("b") == 2
    assert np.array_equal(exported(cache, hookpoint="a")["x"], x.numpy())
    assert np.array_equal(exported(cache, hookpoint="b")["x"], x[:, :2].numpy() * 2)
    with pytest.raises(InputError, match="`hookpoint` must be given.*a, b"):
        export_activations(cache, tmp_path / "x.npy")


def test_other_dtypes_are_rounded_once(x, tmp_path, exported):
    save_file({"x": x.bfloat16()}, tmp_path / "x.safetensors")
    cache = import_activations(tmp_path / "x.safetensors", tmp_path / "bfloat16")
    assert cache.manifest["dtype"] == "bfloat16"
    assert np.array_equal(exported(cache)["x"], x.bfloat16().float().numpy())
    cache = import_activations(x.double(), tmp_path / "double")
    assert cache.manifest["dtype"] == "float32"
    assert np.array_equal(exported(cache)["x"], x.numpy())
    cache = import_activations(x, tmp_path / "half", dtype="float16")
    assert np.array_equal(exported(cache)["x"], x.half().numpy())


def test_int8_keeps_outlier_coordinates_apart(tmp_path, exported):
    x = torch.randn(N, 64)
    x[:, 3] *= 1000
    cache = import_activations(x, tmp_path / "cache", dtype="int8")
    assert cache.manifest["outliers"] == {"acts": [3]}
    found = torch.from_numpy(exported(cache)["x"])
    assert torch.equal(found[:, 3], x[:, 3])
    without = [i for i in range(64) if i != 3]
    scale = x[:, without].abs().amax(1, keepdim=True) / 127
    assert ((found - x)[:, without].abs() <= 0.501 * scale).all()


def test_rows_go_to_a_url_and_come_back(x, tmp_path, exported):
    import fsspec

    url = f"memory://{tmp_path.name}/cache"
    cache = import_activations(x, url)
    assert f"{tmp_path.name}/cache/manifest.json" in " ".join(fsspec.filesystem("memory").find("/"))
    assert np.array_equal(exported(cache)["x"], x.numpy())
