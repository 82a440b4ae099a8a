"""One pass over the cache finds what a dense computation of everything finds, and comes back from disk."""

import pytest
import torch

import sae
from sae.activations.contexts import token_ids_of, whole_contexts
from sae.activations.imported import import_rows
from sae.errors import InputError
from sae.inspection import Evidence, gather_evidence
from sae.inspection.evidence import BINS_PER_OCTAVE


@pytest.fixture(scope="module")
def dictionary(tiny_cache):
    torch.manual_seed(1)
    dictionary = sae.TopK(16, 40, 5)
    moments = tiny_cache.moments("resid.1")
    dictionary.set_input_statistics(moments.mean, moments.mean_squared_norm)
    with torch.no_grad():
        dictionary.b_enc[3] = -1e6  # dead
    return dictionary.eval().requires_grad_(False)


@pytest.fixture(scope="module")
def evidence(dictionary, tiny_cache):
    return gather_evidence(dictionary, tiny_cache, "resid.1")


@pytest.fixture(scope="module")
def dense(dictionary, tiny_cache):
    """Every train sequence's latents, by sequence."""
    batches = list(whole_contexts(tiny_cache, "train", "resid.1"))
    sequence = torch.cat([b.sequence for b in batches])
    latents = torch.cat([dictionary.encode(b.x) for b in batches])
    return latents[sequence.argsort()]


def test_counts_sums_and_maxima_are_those_of_all_rows(evidence, dense):
    rows = dense.flatten(0, 1)
    assert evidence.rows == len(rows)
    assert torch.equal(evidence.firings, (rows > 0).sum(0))
    torch.testing.assert_close(evidence.mass, rows.double().sum(0))
    torch.testing.assert_close(evidence.largest, rows.double().max(0).values)
    assert evidence.firings[3] == 0 and evidence.largest[3] == 0


def test_histograms_count_every_firing_in_its_bin(evidence, dense):
    rows = dense.flatten(0, 1)
    assert torch.equal(evidence.histogram.sum(1), evidence.firings)
    edges = evidence.lowest * 2.0 ** (torch.arange(81, dtype=torch.float64) / BINS_PER_OCTAVE)
    for i in (0, 7):
        values = rows[rows[:, i] > 0, i].double()
        place = torch.bucketize(values, edges, right=True) - 1
        assert torch.equal(evidence.histogram[i], torch.bincount(place, minlength=80))


def test_strongest_contexts_are_exact_over_all_rows(evidence, dense):
    for i in range(40):
        largest = dense[..., i].max(dim=1).values.sort(descending=True).values[:12]
        kept = evidence.top["value"][i]
        torch.testing.assert_close(kept, largest)
        for j in kept.nonzero().flatten().tolist():
            sequence, begin = (int(evidence.top[name][i, j]) for name in ("sequence", "begin"))
            trace = evidence.top["trace"][i, j].float()
            torch.testing.assert_close(trace, dense[sequence, begin : begin + 32, i], rtol=1e-2, atol=1e-4)


def test_tokens_before_are_those_one_position_earlier_in_the_same_context(evidence, dense, tiny_cache):
    ids = token_ids_of(tiny_cache)[: len(dense)]
    i = int(evidence.firings.argmax())
    mass = torch.zeros(257, dtype=torch.float64)
    mass.index_add_(0, ids[:, :-1].flatten(), dense[:, 1:, i].double().flatten())
    for t in evidence.previous.top(i, 300):
        assert t.share == pytest.approx(float(mass[t.token] / mass.sum()))
    assert evidence.previous.text.sum() == ids[:, 1:].numel()


def test_a_limit_takes_whole_contexts_and_never_more(dictionary, tiny_cache):
    assert gather_evidence(dictionary, tiny_cache, "resid.1", max_tokens=1000).rows == 992
    assert gather_evidence(dictionary, tiny_cache, "resid.1", max_tokens=5).rows == 32


def test_saved_and_loaded_it_is_the_same(evidence, tmp_path):
    path = tmp_path / "evidence.safetensors"
    evidence.save(path, {"dictionary": "a"})
    again = Evidence.load(path, {"dictionary": "a"})
    assert again is not None and again.rows == evidence.rows and again.lowest == evidence.lowest
    for name in ("firings", "mass", "largest", "histogram", "null"):
        assert torch.equal(getattr(again, name), getattr(evidence, name))
    for group in ("top", "sampled"):
        for name, tensor in getattr(evidence, group).items():
            assert torch.equal(getattr(again, group)[name], tensor)
    assert again.inputs.top(0, 5)[0].token == evidence.inputs.top(0, 5)[0].token


def test_evidence_of_another_dictionary_or_a_damaged_file_is_not_used(evidence, tmp_path):
    path = tmp_path / "evidence.safetensors"
    assert Evidence.load(path, {}) is None
    evidence.save(path, {"dictionary": "a"})
    assert Evidence.load(path, {"dictionary": "b"}) is None
    whole = path.read_bytes()
    path.write_bytes(whole[:1000])
    assert Evidence.load(path, {"dictionary": "a"}) is None
    path.write_bytes(whole.replace(b"inputs.indptr", b"inputs.inelse"))  # of another version
    assert Evidence.load(path, {"dictionary": "a"}) is None


def test_random_directions_fire_as_often_as_they_are_made_to(evidence):
    density = evidence.null[:, 0]
    assert len(density) > 200
    assert float(density[-48:].mean()) == pytest.approx(0.2, abs=0.02)
    assert (evidence.null[:, 1] <= 1).all() and (evidence.null[:, 2] > 0).all()


def test_a_dead_dictionary_is_no_error(tiny_cache):
    dictionary = sae.TopK(16, 6, 2).requires_grad_(False)
    dictionary.b_enc.fill_(-1e9)
    evidence = gather_evidence(dictionary, tiny_cache, "resid.1", max_tokens=500)
    assert evidence.firings.sum() == 0 and (evidence.top["value"] == 0).all()


def test_bad_input(dictionary, tiny_cache, tmp_path):
    with pytest.raises(InputError, match="d_model=24, the cache .* has 16"):
        gather_evidence(sae.TopK(24, 40, 5), tiny_cache, "resid.1")
    with pytest.raises(InputError, match="PCA has negative latents"):
        rows = next(tiny_cache.batches("train", "resid.1", 500)).x
        gather_evidence(sae.PCA(16).fit([rows], tiny_cache.moments("resid.1")), tiny_cache, "resid.1")
    with pytest.raises(InputError, match="holds no token ids"):
        gather_evidence(dictionary, import_rows(torch.randn(100, 16), tmp_path / "rows"), "acts")
