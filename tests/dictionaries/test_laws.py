"""What every dictionary must do, trained or fitted."""

from functools import partial

import pytest
import torch

import sae
import sae.baselines
from sae.dictionaries import Dictionary, SparseAutoencoder
from sae.dictionaries.penalised import Penalised
from sae.errors import InputError
from sae.ops.moments import StreamingMoments

D, N, K = 12, 24, 4


def _rows(n=200):
    generator = torch.Generator().manual_seed(3)
    mixing = torch.randn(D, D, generator=generator)
    return torch.randn(n, D, generator=generator) @ mixing * 3 + 5


def _moments(rows):
    streaming = StreamingMoments()
    streaming.add(rows)
    return streaming.moments()


def _autoencoder(kind):
    torch.manual_seed(0)
    dictionary = kind(D, N, **ARGUMENTS[kind.__name__])
    moments = _moments(_rows())
    dictionary.set_input_statistics(moments.mean, moments.mean_squared_norm)
    with torch.no_grad():
        if hasattr(dictionary, "b_enc"):
            dictionary.b_enc.normal_(std=0.1)
        dictionary.b_dec.normal_(std=0.1)
        for name in ("r_mag", "b_mag", "threshold"):
            if hasattr(dictionary, name):
                getattr(dictionary, name).add_(0.1 * torch.rand(()))
    return dictionary


def _fitted(baseline):
    return baseline.fit([_rows()], _moments(_rows()))


ARGUMENTS = {
    name: {"target_l0": float(K)} if issubclass(kind, Penalised) else {"k": K}
    for name, kind in Dictionary.kinds.items()
    if issubclass(kind, SparseAutoencoder)
}
MAKERS = {
    **{name: partial(_autoencoder, Dictionary.kinds[name]) for name in ARGUMENTS},
    "PCA": lambda: _fitted(sae.PCA(D)),
    "NMF": lambda: _fitted(sae.NMF(D, D)),
    "SemiNMF": lambda: _fitted(sae.baselines.SemiNMF(D, N, tolerance=0.05)),
    "ICA": lambda: _fitted(sae.baselines.ICA(D, tolerance=0.5)),
    "KMeans": lambda: _fitted(sae.baselines.KMeans(D, N, tolerance=0.05)),
    "DictionaryLearning": lambda: _fitted(sae.baselines.DictionaryLearning(D, N, K, tolerance=0.5)),
    "NaturalBasis": lambda: _fitted(sae.baselines.NaturalBasis(D)),
    "RandomDirections": lambda: _fitted(sae.baselines.RandomDirections(D, N)),
    "Refined": lambda: sae.Refined.of(_autoencoder(sae.TopK)),
}


@pytest.fixture(params=MAKERS)
def dictionary(request):
    return MAKERS[request.param]()


def test_laws_cover_every_kind():
    assert set(MAKERS) == set(Dictionary.kinds)


def test_encode_decode_keep_leading_axes(dictionary):
    x = _rows(6).reshape(2, 3, D)
    latents = dictionary.encode(x)
    assert latents.shape == (2, 3, dictionary.n_latents)
    assert dictionary.decode(latents).shape == x.shape
    assert dictionary(x).x_hat.shape == x.shape
    torch.testing.assert_close(latents[1, 2], dictionary.encode(x[1, 2]), rtol=1e-4, atol=1e-4)


def test_sparse_code_equals_dense_code(dictionary):
    x = _rows(20)
    dense, sparse = dictionary.encode(x), dictionary.encode_sparse(x)
    torch.testing.assert_close(sparse.to_dense(dictionary.n_latents), dense)
    assert (sparse.values != 0).all()
    torch.testing.assert_close(
        dictionary.decode_sparse(sparse), dictionary.decode(dense), rtol=1e-4, atol=1e-4
    )


def test_forward_is_decode_of_encode(dictionary):
    x = _rows(20)
    torch.testing.assert_close(
        dictionary(x).x_hat, dictionary.decode(dictionary.encode(x)), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("width", [D - 1, 2 * D])
def test_rows_of_another_width_are_an_error(dictionary, width):
    with pytest.raises(InputError, match=f"must have d_model={D} columns, got"):
        dictionary(torch.randn(4, width))


def test_directions_are_unit_rows(dictionary):
    assert dictionary.directions.shape == (dictionary.n_latents, D)
    torch.testing.assert_close(dictionary.directions.norm(dim=1), torch.ones(dictionary.n_latents))


def test_decode_is_linear_along_the_directions(dictionary):
    one = torch.zeros(dictionary.n_latents)
    one[1] = 2.0
    step = dictionary.decode(one) - dictionary.decode(torch.zeros(dictionary.n_latents))
    torch.testing.assert_close(step, 2.0 * dictionary.directions[1], rtol=1e-4, atol=1e-4)


def test_saved_and_loaded_dictionary_computes_the_same(dictionary, tmp_path):
    sae.save(dictionary, tmp_path / "dictionary", hookpoint="resid.2", model="demo")
    for folder in (tmp_path, tmp_path / "dictionary"):
        loaded = sae.load(folder)
        assert type(loaded) is type(dictionary) and loaded.config == dictionary.config
        x = _rows(50)
        torch.testing.assert_close(loaded.encode(x), dictionary.encode(x), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(loaded(x).x_hat, dictionary(x).x_hat, rtol=1e-3, atol=1e-3)


def test_saved_form_needs_one_product_and_the_stated_rule(dictionary):
    tensors = dictionary.saved_tensors()
    torch.testing.assert_close(tensors["W_dec"].norm(dim=1), torch.ones(dictionary.n_latents))
    if "W_enc" in tensors and isinstance(dictionary, SparseAutoencoder):
        x = _rows(30)
        latents = _by_rule(dictionary, tensors, x @ tensors["W_enc"] + tensors["b_enc"])
        torch.testing.assert_close(latents, dictionary.encode(x), rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(
            latents @ tensors["W_dec"] + tensors["b_dec"], dictionary(x).x_hat, rtol=1e-3, atol=1e-3
        )


def _by_rule(dictionary, tensors, pre_acts):
    """The rule that config.json states, written down again."""
    name = type(dictionary).__name__
    if name == "TopK":
        top = pre_acts.topk(K)
        return torch.zeros_like(pre_acts).scatter(1, top.indices, top.values.relu())
    if name == "ReLU":
        return pre_acts.relu()
    if name == "Gated":
        magnitudes = tensors["r_mag"].exp() * (pre_acts - tensors["b_enc"]) + tensors["b_mag"]
        return magnitudes.relu() * (pre_acts > 0)
    return pre_acts * (pre_acts > tensors["threshold"])


def test_d_model_is_the_first_argument_of_every_kind(dictionary):
    assert next(iter(dictionary.config)) == "d_model"


@pytest.mark.parametrize("name", MAKERS)
def test_no_latents_or_no_width_is_an_error(name):
    kind = Dictionary.kinds[name]
    extra = {"k": 1} if name in ("Refined", "DictionaryLearning") else ARGUMENTS.get(name, {})
    if name == "NaturalBasis":  # has no such argument: as many as the rows are wide
        with pytest.raises(InputError, match="`d_model` must be"):
            kind(0)
        return
    with pytest.raises(InputError, match="`n_latents` must be"):
        kind(D, n_latents=0, **extra)
    with pytest.raises(InputError, match="`d_model` must be"):
        kind(0, n_latents=4, **extra)
