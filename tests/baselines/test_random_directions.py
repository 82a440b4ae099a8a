"""Random directions: what they are, and that their codes are the best on them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from sae.baselines import RandomDirections
from sae.baselines.linear import pseudo_inverse
from sae.ops.moments import Moments, StreamingMoments


def _moments(x: Tensor) -> Moments:
    streaming = StreamingMoments()
    streaming.add(x)
    return streaming.moments()


def _rows(n: int = 200, d: int = 12) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0)) + 4


def _fitted(x: Tensor, n_latents: int, seed: int = 0) -> RandomDirections:
    return RandomDirections(x.shape[1], n_latents, seed).fit([], _moments(x))


@pytest.mark.parametrize("n_latents", [5, 12, 30])
def test_random_directions_dense_code_is_the_shortest_least_squares_code(n_latents: int) -> None:
    x = _rows()
    fitted = _fitted(x, n_latents)
    atoms = fitted.directions.double().numpy()
    expected = np.linalg.lstsq(atoms.T, (x.double() - x.double().mean(0)).numpy().T, rcond=None)[0].T
    torch.testing.assert_close(fitted.encode(x).double(), torch.from_numpy(expected), rtol=1e-3, atol=1e-3)
    if n_latents >= 12:
        torch.testing.assert_close(fitted(x).x_hat, x, rtol=0, atol=1e-4)


def test_random_directions_have_the_cosines_of_chance() -> None:
    directions = _fitted(_rows(d=64), 400).directions
    cosines = (directions @ directions.T)[~torch.eye(400, dtype=torch.bool)]
    assert cosines.square().mean().item() == pytest.approx(1 / 64, rel=0.03)
    assert cosines.mean().abs() < 0.002


def test_random_directions_sparse_code_is_refitted() -> None:
    x = _rows()
    fitted = _fitted(x, 40)
    code = fitted.sparse_code(x, 3)
    left = x - fitted.decode_sparse(code)
    assert (left @ fitted.directions.T)[code.rows, code.indices].abs().max() < 1e-4
    assert (code.row_offsets.diff() == 3).all() and (code.values < 0).any()


def test_random_directions_seed_and_moments_are_all_they_depend_on() -> None:
    x = _rows()
    assert torch.equal(_fitted(x, 9).directions, _fitted(x + 1, 9).directions)
    assert not torch.equal(_fitted(x, 9).directions, _fitted(x, 9, seed=1).directions)
    torch.testing.assert_close(_fitted(x + 1, 9).mean, x.mean(0) + 1)


@pytest.mark.parametrize("shape", [(4, 9), (9, 4), (5, 5)])
def test_pseudo_inverse_is_that_of_numpy(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix[1] = 2 * matrix[0]  # dependent rows
    expected = torch.from_numpy(np.linalg.pinv(matrix.numpy()))
    torch.testing.assert_close(pseudo_inverse(matrix), expected, rtol=1e-6, atol=1e-6)
