"""The natural basis: its codes, and kurtosis against rotations."""

from __future__ import annotations

import pytest
import torch
from scipy.stats import kurtosis
from torch import Tensor

from sae.baselines import NaturalBasis
from sae.baselines.natural import ROTATIONS, random_rotations
from sae.errors import InputError
from sae.ops.moments import Moments, StreamingMoments


def _moments(x: Tensor) -> Moments:
    streaming = StreamingMoments()
    streaming.add(x)
    return streaming.moments()


def _fitted(x: Tensor, **options: int) -> NaturalBasis:
    return NaturalBasis(x.shape[1], **options).fit(iter(x.split(900)), _moments(x))


def _privileged(n: int = 20_000, d: int = 16) -> Tensor:
    """Gaussian coordinates, but for the third, whose tails are heavy."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, d, generator=generator)
    x[:, 2] *= torch.where(torch.rand(n, generator=generator) < 0.02, 8.0, 0.5)
    return x + 3


def test_natural_code_by_hand() -> None:
    x = torch.tensor([[5.0, 1.0, 0.0], [-1.0, 1.0, 0.5], [2.0, -2.0, -0.5]])  # mean (2, 0, 0)
    natural = _fitted(x)
    torch.testing.assert_close(natural.encode(x), x - torch.tensor([2.0, 0, 0]))
    code = natural.sparse_code(x, 1)
    torch.testing.assert_close(code.values, torch.tensor([3.0, -3.0, -2.0]))
    assert code.indices.tolist() == [0, 0, 1]
    torch.testing.assert_close(natural.decode_sparse(natural.sparse_code(x, 9)), x)


def test_natural_heavy_tailed_coordinate_stands_out_from_rotations() -> None:
    natural = _fitted(_privileged())
    assert natural.kurtosis.argmax() == 2 and natural.kurtosis[2] > 20
    others = torch.arange(16) != 2
    assert natural.kurtosis[others].abs().max() < 0.3
    assert natural.kurtosis_rotated.max() < natural.kurtosis[2] / 3


def test_natural_of_rotated_rows_agrees_with_the_control() -> None:
    x = _privileged(d=32) @ random_rotations(32, seed=5)[0].float()
    natural = _fitted(x)
    here, rotated = natural.kurtosis, natural.kurtosis_rotated
    assert here.mean() == pytest.approx(rotated.mean().item(), abs=0.3)
    assert here.max() < 3 * rotated.max() and rotated.max() < 3 * here.max()


def test_natural_kurtosis_is_that_of_scipy() -> None:
    x = _privileged(3000).double() * torch.logspace(-3, 3, 16).double() + 50
    natural = NaturalBasis(16).double().fit([x], _moments(x))
    torch.testing.assert_close(natural.kurtosis, torch.from_numpy(kurtosis(x.numpy())), rtol=1e-6, atol=1e-8)
    for found, rotation in zip(natural.kurtosis_rotated, random_rotations(16, 0), strict=True):
        turned = torch.from_numpy(kurtosis((x @ rotation).numpy()))
        torch.testing.assert_close(found, turned, rtol=1e-6, atol=1e-8)


def test_natural_moments_of_more_rows_do_not_bend_the_kurtosis() -> None:
    x = _privileged(4000).double()
    natural = NaturalBasis(16).double().fit([x[:1000]], _moments(x))
    expected = torch.from_numpy(kurtosis(x[:1000].numpy()))
    torch.testing.assert_close(natural.kurtosis, expected, rtol=1e-8, atol=1e-8)


def test_natural_constant_coordinate_has_no_kurtosis() -> None:
    x = _privileged(500)
    x[:, 4] = 0.1
    natural = _fitted(x)
    assert natural.kurtosis[4] == 0 and natural.kurtosis_rotated.isfinite().all()


def test_natural_rotations_are_orthogonal_seeded_and_several() -> None:
    rotations = random_rotations(20, 3)
    torch.testing.assert_close(rotations @ rotations.mT, torch.eye(20).double().expand(ROTATIONS, 20, 20))
    assert torch.equal(rotations, random_rotations(20, 3))
    assert (rotations[0] - rotations[1]).abs().max() > 0.1
    x = _privileged(500)
    one, other = _fitted(x), _fitted(x, seed=1)
    assert torch.equal(one.kurtosis, other.kurtosis)
    assert not torch.equal(one.kurtosis_rotated, other.kurtosis_rotated)


def test_natural_saves_both_kurtoses() -> None:
    x = _privileged(500)
    natural, again = _fitted(x), NaturalBasis(16)
    again.load_saved_tensors(natural.saved_tensors())
    assert torch.equal(again.kurtosis, natural.kurtosis)
    assert torch.equal(again.kurtosis_rotated, natural.kurtosis_rotated)
    tensors = natural.saved_tensors()
    with pytest.raises(InputError, match=r"`kurtosis_rotated` .* shape \(4, 16\), got \(16,\)"):
        again.load_saved_tensors(tensors | {"kurtosis_rotated": natural.kurtosis_rotated[0]})
    torch.testing.assert_close(x @ tensors["W_enc"] + tensors["b_enc"], natural.encode(x))


def test_natural_bad_input_raises() -> None:
    x = _privileged(50)
    with pytest.raises(InputError, match="`batches` must give at least one row"):
        NaturalBasis(16).fit([], _moments(x))
    with pytest.raises(InputError, match=r"`batches` must be of shape \(rows, d_model=16\), got \(50, 15\)"):
        NaturalBasis(16).fit([x[:, :15]], _moments(x))
