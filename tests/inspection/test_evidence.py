"""One pass over the cache finds what a dense computation of everything finds, and comes back from disk."""

import pytest
import torch

import sae
from sae.activations.contexts import cached_positions, token_ids_of, whole_contexts
from sae.activations.exchange.imported import import_rows
from sae.errors import InputError
from sae.inspection import Evidence, gather_evidence
from sae.inspection.evidence import BINS_PER_OCTAVE
from sae.inspection.null import RandomDetectors


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
    ids = token_ids_of(tiny_cache)[: len(dense)].long()
    i = int(evidence.firings.argmax())
    mass = torch.zeros(257, dtype=torch.float64)
    mass.index_add_(0, ids[:, :-1].flatten(), dense[:, 1:, i].double().flatten())
    for t in evidence.previous.top(i, 300):
        assert t.share == pytest.approx(float(mass[t.token] / mass.sum()))
    assert evidence.previous.text.sum() == ids[:, 1:].numel()


def test_a_limit_takes_whole_contexts_and_never_more(dictionary, tiny_cache):
    assert gather_evidence(dictionary, tiny_cache, "resid.1", max_tokens=1000).rows == 992
    assert gather_evidence(dictionary, tiny_cache, "resid.1", max_tokens=5).rows == 32


@pytest.fixture(scope="module", params=["without position 0", "holes everywhere"])
def partial(request, tmp_path_factory, tiny_cache, without_first, drop_rows):
    """A cache that lacks rows."""
    if request.param == "without position 0":
        return without_first
    generator = torch.Generator().manual_seed(7)
    cached = torch.rand(tiny_cache.token_ids.shape, generator=generator) < 0.4
    cached[3] = False
    return drop_rows(tiny_cache, tmp_path_factory.mktemp("holes") / "cache", cached)


@pytest.fixture(scope="module")
def of_partial(dictionary, partial):
    """The evidence of it."""
    return gather_evidence(dictionary, partial, "resid.1")


def test_positions_without_a_row_count_for_nothing(of_partial, partial, dense, tiny_cache):
    """Against brute force over the rows that are cached, from the latents of the whole cache."""
    cached = cached_positions(partial)[: len(dense)]
    ids = token_ids_of(tiny_cache)[: len(dense)].long()
    rows = dense[cached]
    assert of_partial.rows == len(rows) < dense[..., 0].numel()
    assert torch.equal(of_partial.firings, (rows > 0).sum(0))
    torch.testing.assert_close(of_partial.mass, rows.double().sum(0))
    torch.testing.assert_close(of_partial.largest, rows.double().max(0).values)
    assert torch.equal(of_partial.histogram.sum(1), of_partial.firings)
    later = cached.clone()
    later[:, 0] = False
    before = ids.roll(1, dims=1)
    for counts, tokens, here in (
        (of_partial.inputs, ids, cached),
        (of_partial.previous, before, later),
    ):
        p = torch.bincount(tokens[here], minlength=counts.vocabulary)
        assert counts.text.tolist() == p.tolist()
        for i in (0, int(of_partial.firings.argmax())):
            mass = torch.zeros(len(p), dtype=torch.float64)
            mass.index_add_(0, tokens[here], dense[here][:, i].double())
            for t in counts.top(i, 300):
                share = float(mass[t.token] / mass.sum())
                assert t.share == pytest.approx(share)
                assert t.lift == pytest.approx(share / float(p[t.token] / p.sum()))


def test_contexts_show_every_token_but_fire_only_at_rows(of_partial, partial, dense):
    fires = dense * cached_positions(partial)[: len(dense), :, None]
    for i in range(40):
        largest = fires[..., i].max(dim=1).values.sort(descending=True).values[:12]
        torch.testing.assert_close(of_partial.top["value"][i], largest)
        for best in (of_partial.top, of_partial.sampled):
            for j in best["value"][i].nonzero().flatten().tolist():
                sequence, begin, peak = (int(best[name][i, j]) for name in ("sequence", "begin", "peak"))
                window = fires[sequence, begin : begin + 32, i]
                torch.testing.assert_close(best["trace"][i, j].float(), window, rtol=1e-2, atol=1e-4)
                torch.testing.assert_close(best["value"][i, j], window[peak])


def test_random_directions_are_set_and_scored_on_rows_alone(of_partial, partial):
    """As many of them as of a cache that had only these rows, firing as often."""
    density = of_partial.null[:, 0]
    assert float(density[-48:].mean()) == pytest.approx(0.2, abs=0.02)
    rows = torch.cat([b.x[b.cached] for b in whole_contexts(partial, "train", "resid.1")])
    code = RandomDetectors(rows, len(rows)).encode_sparse(rows)
    firings = torch.bincount(code.indices, minlength=len(density))
    torch.testing.assert_close(density, firings[firings > 0].double() / len(rows))


def test_a_limit_counts_rows_and_takes_whole_contexts(dictionary, partial, dense):
    rows = cached_positions(partial)[: len(dense)].sum(1)
    for limit in (5, 40, 1000):
        seen = gather_evidence(dictionary, partial, "resid.1", max_tokens=limit)
        order = torch.cat([b.sequence for b in whole_contexts(partial, "train", "resid.1")])
        sums = rows[order].cumsum(0)
        whole = max(32, limit // 32 * 32)
        assert seen.rows == int(sums[sums <= whole][-1]) > whole - 32


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
