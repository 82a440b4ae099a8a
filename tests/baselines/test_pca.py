"""PCA against scikit-learn, its ordering and its orientation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA as SkPCA
from torch import Tensor

from sae.baselines import PCA
from sae.dictionaries.base import Dictionary
from sae.errors import InputError
from sae.ops.moments import Moments, StreamingMoments


def _moments(x: Tensor) -> Moments:
    streaming = StreamingMoments()
    streaming.add(x)
    return streaming.moments()


def _rows(n: int = 600, d: int = 8, offset: float = 2.0) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(d, d, generator=generator, dtype=torch.float64)
    return torch.randn(n, d, generator=generator, dtype=torch.float64) @ mixing + offset


def _fitted(x: Tensor, n_latents: int | None = None) -> PCA:
    return PCA(x.shape[1], n_latents).to(x.dtype).fit([x], _moments(x))


def test_pca_of_four_points_by_hand() -> None:
    x = torch.tensor([[3.0, 1.0], [-1.0, 1.0], [1.0, 2.0], [1.0, 0.0]])  # mean (1, 1), axes 2 and 1 long
    pca = _fitted(x)
    torch.testing.assert_close(pca.directions, torch.eye(2))
    torch.testing.assert_close(pca.variances, torch.tensor([2.0, 0.5]))
    torch.testing.assert_close(pca.encode(x), torch.tensor([[2.0, 0], [-2, 0], [0, 1], [0, -1]]))
    torch.testing.assert_close(pca.fvu_by_rank(), torch.tensor([1.0, 0.2, 0.0], dtype=torch.float64))


def test_pca_equals_scikit_learn() -> None:
    x = _rows()
    pca, reference = _fitted(x), SkPCA().fit(x.numpy())
    signs = np.sign((pca.directions.numpy() * reference.components_).sum(1, keepdims=True))
    np.testing.assert_allclose(pca.directions.numpy(), signs * reference.components_, atol=1e-6)
    biased = reference.explained_variance_ * (len(x) - 1) / len(x)
    np.testing.assert_allclose(pca.variances.numpy(), biased, rtol=1e-6)
    np.testing.assert_allclose(pca.encode(x).numpy(), signs.T * reference.transform(x.numpy()), atol=1e-6)


@pytest.mark.parametrize("rank", [1, 3, 8])
def test_pca_truncated_reconstruction_equals_scikit_learn(rank: int) -> None:
    # A transposed basis reconstructs perfectly at full rank; only a truncated one shows it.
    x = _rows()
    reference = SkPCA(rank).fit(x.numpy())
    expected = reference.inverse_transform(reference.transform(x.numpy()))
    np.testing.assert_allclose(_fitted(x, rank)(x).x_hat.numpy(), expected, atol=1e-6)
    latents = _fitted(x).encode(x)
    latents[:, rank:] = 0
    np.testing.assert_allclose(_fitted(x).decode(latents).numpy(), expected, atol=1e-6)


def test_pca_latents_have_the_variances_in_falling_order() -> None:
    x = _rows()
    pca = _fitted(x)
    torch.testing.assert_close(pca.encode(x).var(0, correction=0), pca.variances)
    assert (pca.variances.diff() <= 0).all()


def test_pca_fvu_by_rank_is_the_measured_one() -> None:
    x = _rows()
    total = (x - x.mean(0)).square().sum()
    measured = [1.0] + [((x - _fitted(x, r)(x).x_hat).square().sum() / total).item() for r in range(1, 9)]
    np.testing.assert_allclose(_fitted(x).fvu_by_rank().numpy(), measured, atol=1e-9)
    np.testing.assert_allclose(_fitted(x, 3).fvu_by_rank().numpy(), measured, atol=1e-9)


def test_pca_with_a_large_mean_is_exact() -> None:
    x, far = _rows(offset=0.0), _rows(offset=1e4)
    torch.testing.assert_close(_fitted(far).encode(far), _fitted(x).encode(x), atol=1e-5, rtol=0)
    single = far.float()
    x_hat = _fitted(single)(single).x_hat
    assert (x_hat - single).abs().max() <= 4e-3  # two roundings of a float32 of about 1e4


def test_pca_sign_is_set_by_the_largest_coordinate() -> None:
    directions = _fitted(_rows()).directions
    largest = directions.gather(1, directions.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()


def test_pca_sparse_code_is_the_best_code_of_k_terms() -> None:
    x = _rows(50, 4)
    pca = _fitted(x)
    code = pca.sparse_code(x, 2)
    error = (x - pca.decode_sparse(code)).square().sum(1)
    latents = pca.encode(x)
    for pair in torch.combinations(torch.arange(4)):
        other = torch.zeros_like(latents).index_copy(1, pair, latents[:, pair])
        assert (error <= (x - pca.decode(other)).square().sum(1) + 1e-9).all()
    assert (code.row_offsets.diff() == 2).all()
    torch.testing.assert_close(pca.decode_sparse(pca.sparse_code(x, 99)), x)


def test_pca_saved_tensors_are_one_affine_map_and_rebuild_it() -> None:
    assert Dictionary.kinds["PCA"] is PCA
    x = _rows()
    pca = _fitted(x, 5)
    tensors = pca.saved_tensors()
    torch.testing.assert_close(x @ tensors["W_enc"] + tensors["b_enc"], pca.encode(x))
    torch.testing.assert_close(pca.encode(x) @ tensors["W_dec"] + tensors["b_dec"], pca(x).x_hat)
    again = PCA(**pca.config).double()
    again.load_saved_tensors(tensors)
    assert torch.equal(again.encode(x), pca.encode(x)) and torch.equal(again.fvu_by_rank(), pca.fvu_by_rank())
    other = PCA(**pca.config).double()
    other.load_state_dict(pca.state_dict())
    assert torch.equal(other.encode(x), pca.encode(x))


def test_pca_takes_leading_axes() -> None:
    x = _rows(12, 4)
    pca = _fitted(x)
    latents = pca.encode(x.reshape(3, 4, 4))
    torch.testing.assert_close(latents.reshape(12, 4), pca.encode(x))
    torch.testing.assert_close(pca.decode(latents), x.reshape(3, 4, 4))


def test_pca_before_fit_raises() -> None:
    pca, x = PCA(4), torch.ones(2, 4)
    for use in (pca.encode, pca.saved_tensors, pca.fvu_by_rank, pca.forward, lambda *_: pca.directions):
        with pytest.raises(InputError, match="`PCA` must be fitted before use.*call fit"):
            use(*([x] if use in (pca.encode, pca.forward) else []))
    with pytest.raises(InputError, match="`PCA` must be fitted before use"):
        pca.sparse_code(x, 1)


def test_pca_bad_input_raises() -> None:
    x = _rows(20, 4)
    with pytest.raises(InputError, match=r"`n_latents` must be in \[1, d_model=4\], got n_latents=5"):
        PCA(4, 5)
    with pytest.raises(InputError, match="`moments` must be of d_model=3 columns, got 4"):
        PCA(3).fit([x], _moments(x))
    with pytest.raises(InputError, match="positive total variance, got 0"):
        PCA(4).fit([x], _moments(torch.ones(5, 4)))
    with pytest.raises(InputError, match="`x` must have d_model=4 columns, got 3"):
        _fitted(x).encode(x[:, :3])
    with pytest.raises(InputError, match=r"`k` must be in \[1, n_latents=4\], got k=0"):
        _fitted(x).sparse_code(x, 0)
