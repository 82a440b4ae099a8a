"""Token purity on codes whose answer is known."""

import torch

from sae.inspection.purity import token_purity
from sae.ops.sparse import from_dense


def test_latents_of_single_tokens_are_pure_and_chance_is_not():
    tokens = torch.arange(4).repeat(100)
    code = from_dense(torch.eye(4)[tokens])
    found = token_purity(code, tokens, 4, 10)
    assert found.purity == 1.0 and 0.0 <= found.null < 0.1


def test_a_latent_that_fires_everywhere_says_nothing():
    tokens = torch.arange(4).repeat(50)
    found = token_purity(from_dense(torch.ones(200, 1)), tokens, 1, 4)
    assert abs(found.purity) < 1e-9 and abs(found.null) < 1e-9


def test_the_two_signs_of_a_coefficient_count_as_two_latents():
    tokens = torch.tensor([0, 1]).repeat(50)
    values = torch.where(tokens == 0, 1.0, -1.0)[:, None]
    assert token_purity(from_dense(values), tokens, 1, 2).purity == 1.0
    assert abs(token_purity(from_dense(values.abs()), tokens, 1, 2).purity) < 1e-9


def test_rare_latents_look_clear_by_chance_and_the_null_says_so():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(50, (400,), generator=generator)
    code = from_dense((torch.rand(400, 200, generator=generator) < 0.005).float())
    found = token_purity(code, tokens, 200, 50)
    assert found.purity > 0.5 and abs(found.purity - found.null) < 0.05


def test_a_code_that_never_fires_has_no_purity():
    assert token_purity(from_dense(torch.zeros(5, 3)), torch.zeros(5, dtype=torch.long), 3, 2) is None
