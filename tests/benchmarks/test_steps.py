"""The step as it is, and as it is written first."""

import pytest
import torch

from sae.benchmarks.cases import Case, parse
from sae.benchmarks.steps import Dense, Ours
from sae.errors import InputError


def test_200_steps_are_those_of_the_dense_reference():
    case = Case(32, 512, 4, 128)
    ours, dense = Ours(case), Dense(case)
    batches = case.batches(8)
    for step in range(200):
        mine, theirs = ours(batches[step % 8]), dense(batches[step % 8])
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=0)
    dictionary = ours.learner.dictionary
    for found, wanted in (
        (dictionary.W_dec, dense.W_dec), (dictionary.W_enc_rows, dense.W_enc),
        (dictionary.b_dec, dense.b_dec), (dictionary.b_enc, dense.b_enc),
    ):  # fmt: skip
        assert (found - wanted).norm() <= 1e-4 * wanted.norm()


@pytest.mark.parametrize("text", ["1,2,3", "a,b,c,d", "8,4,0,2", "8,-4,1,2"])
def test_a_case_that_is_none_is_refused(text):
    with pytest.raises(InputError, match="`--case` must be d_model,n_latents,k,rows, got"):
        parse(text, "float32", "cpu")


def test_a_case_of_more_latents_than_there_are_is_refused():
    with pytest.raises(InputError, match="must have k <= n_latents"):
        parse("8,4,5,2", "float32", "cpu")
