"""The encoder's product in blocks is the product."""

import pytest
import torch
from torch.nn import functional as F

from sae.ops import encoder
from sae.ops.encoder import PreActs


@pytest.fixture
def small_blocks(monkeypatch):
    monkeypatch.setattr(encoder, "rows_at_once", lambda n_latents, device: 4)


@pytest.mark.parametrize("rows", [0, 1, 4, 11])
def test_blocks_together_are_the_whole_product(small_blocks, rows):
    v, W, b = torch.randn(rows, 6), torch.randn(9, 6, requires_grad=True), torch.randn(9)
    found = [(first, pre_acts.clone()) for first, pre_acts in PreActs(v, W, b)]
    assert [first for first, _ in found] == list(range(0, max(1, rows), 4))
    torch.testing.assert_close(torch.cat([block for _, block in found]), F.linear(v, W, b).detach())
    assert not any(block.requires_grad for _, block in found)


def test_blocks_of_any_dtype_but_float32_take_each_others_place(small_blocks):
    """In float32 oneDNN gives out memory of its own."""
    tensors = [torch.randn(shape, dtype=torch.float64) for shape in ((20, 3), (5, 3), (5,))]
    places = {block.pre_acts.data_ptr() for block in PreActs(*tensors)}
    assert len(places) == 1


def test_autocast_asks_for_its_dtype():
    v, W, b = torch.randn(7, 6), torch.randn(9, 6), torch.randn(9)
    with torch.autocast("cpu", torch.bfloat16):
        (block,) = PreActs(v, W, b)
        wanted = F.linear(v, W, b)
    assert block.pre_acts.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(block.pre_acts, wanted, rtol=0.01, atol=0.01)


def test_blocks_can_be_gone_through_again():
    pre_acts = PreActs(torch.randn(7, 6), torch.randn(9, 6), torch.randn(9), at_once=3)
    once, again = ([block.pre_acts.clone() for block in pre_acts] for _ in range(2))
    assert len(once) == 3 and all(map(torch.equal, once, again))
