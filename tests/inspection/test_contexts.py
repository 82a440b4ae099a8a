"""The contexts kept are the strongest, exactly, and a fair sample; their traces are the activations."""

import pytest
import torch

from sae.inspection.contexts import BestPerLatent, ContextKeeper, _uniform_hash
from sae.ops.sparse import from_dense

N, CONTEXT = 6, 12


@pytest.fixture
def latents():
    """Activations of 6 latents on 50 sequences; the last latent is dead, some firings are equal."""
    dense = torch.rand(50, CONTEXT, N) * (torch.rand(50, CONTEXT, N) < 0.2)
    dense[..., 1] = dense[..., 1].mul(4).ceil() / 4  # ties
    dense[..., -1] = 0.0
    return dense


def _keep(latents, batch, **options):
    settings = {"window": 5, "top": 8, "sampled": 8} | options
    keeper = ContextKeeper(N, CONTEXT, device=torch.device("cpu"), **settings)
    for sequences in torch.arange(len(latents)).split(batch):
        keeper.add(sequences, from_dense(latents[sequences].reshape(-1, N)))
    return keeper


@pytest.mark.parametrize("batch", [1, 7, 50])
def test_top_contexts_are_the_sequences_with_the_largest_maxima(latents, batch):
    kept = _keep(latents, batch).top.kept
    for i in range(N):
        largest = latents[..., i].max(dim=1).values
        expected = largest.sort(descending=True).values[:8]
        assert torch.equal(kept["value"][i], expected)
        sequences = kept["sequence"][i].long()[kept["value"][i] > 0]
        assert len(sequences.unique()) == len(sequences)
        assert torch.equal(largest[sequences], kept["value"][i][kept["value"][i] > 0])


@pytest.mark.parametrize("which", ["top", "sampled"])
@pytest.mark.parametrize("window", [1, 5, 12, 40])
def test_traces_are_the_activations_around_the_firing(latents, which, window):
    kept = getattr(_keep(latents, 9, window=window), which).kept
    width = min(window, CONTEXT)
    assert kept["trace"].shape[-1] == width
    for i in range(N - 1):
        for j in range(8):
            sequence, begin, peak = (int(kept[name][i, j]) for name in ("sequence", "begin", "peak"))
            assert 0 <= begin <= CONTEXT - width
            true = latents[sequence, begin : begin + width, i]
            assert torch.equal(kept["trace"][i, j], true.bfloat16())
            assert float(kept["value"][i, j]) == float(true[peak])


@pytest.mark.parametrize("batch", [1, 7, 23])
def test_what_is_kept_does_not_depend_on_the_size_of_batches(latents, batch):
    once, often = _keep(latents, 50), _keep(latents, batch)
    for which in ("top", "sampled"):
        for name, tensor in getattr(once, which).kept.items():
            assert torch.equal(getattr(often, which).kept[name], tensor), (which, name)


def test_the_sample_is_uniform_over_firings():
    """Of 4,000 latents that fire at the same 20 places, each place is kept for a quarter of them."""
    keeper = ContextKeeper(4000, 10, window=1, top=1, sampled=5, device=torch.device("cpu"))
    for sequence in range(4):
        dense = torch.zeros(10, 4000)
        dense[::2] = 1.0 + sequence
        keeper.add(torch.tensor([sequence]), from_dense(dense))
    kept = keeper.sampled.kept
    place = kept["sequence"] * 10 + kept["begin"]
    counts = torch.bincount(place.flatten(), minlength=40)[::2].double()
    assert int(counts.sum()) == 20_000 and len(counts) == 20
    chi_square = float(((counts - 1000) ** 2 / 1000).sum())
    assert chi_square < 43.8  # 99.9th percentile at 19 degrees of freedom


def test_hash_is_uniform_and_depends_on_every_number():
    i = torch.arange(100_000)
    values = _uniform_hash(i, i * 0 + 3, i * 0)
    assert values.min() >= 0 and values.max() < 1
    assert torch.allclose(torch.histc(values.float(), 10, 0, 1) / 100_000, torch.full((10,), 0.1), atol=0.005)
    assert abs(float(torch.corrcoef(torch.stack([values[:-1], values[1:]]))[0, 1])) < 0.01
    assert not torch.equal(values, _uniform_hash(i, i * 0 + 4, i * 0))
    assert not torch.equal(values, _uniform_hash(i, i * 0 + 3, i * 0 + 1))


def test_best_keeps_the_first_of_equals():
    best = BestPerLatent(1, 2, {"name": torch.empty(0, dtype=torch.int64)})
    for names in ([1, 2], [3, 4], [5]):
        tensor = torch.tensor(names)
        best.offer(
            torch.zeros(len(names), dtype=torch.int64),
            torch.ones(len(names)),
            lambda c, t=tensor: {"name": t[c]},
        )
    assert best.kept["name"].tolist() == [[1, 2]]


def test_a_batch_without_firings_changes_nothing(latents):
    keeper = _keep(latents, 50)
    before = {name: tensor.clone() for name, tensor in keeper.top.kept.items()}
    keeper.add(torch.tensor([99]), from_dense(torch.zeros(CONTEXT, N)))
    assert all(torch.equal(keeper.top.kept[name], tensor) for name, tensor in before.items())
