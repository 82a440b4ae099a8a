"""Bits of a code against counting."""

import math

import pytest

from sae.errors import InputError
from sae.ops.bits import VALUE_BITS, bits_per_row


@pytest.mark.parametrize(("n", "l0"), [(10, 3), (2048, 16), (7, 7), (5, 0)])
def test_bits_count_the_choices_values_and_signs(n, l0):
    expected = math.log2(math.comb(n, l0)) + VALUE_BITS * l0
    assert bits_per_row(n, l0, False) == pytest.approx(expected)
    assert bits_per_row(n, l0, True) == pytest.approx(expected + l0)


def test_bits_lie_between_those_of_the_neighbouring_whole_numbers():
    assert bits_per_row(512, 8, False) < bits_per_row(512, 8.5, False) < bits_per_row(512, 9, False)


@pytest.mark.parametrize("l0", [-0.5, 8.5, float("nan")])
def test_an_l0_out_of_range_is_an_error(l0):
    with pytest.raises(InputError, match=r"`l0` must lie in \[0, n_latents=8\]"):
        bits_per_row(8, l0, False)
