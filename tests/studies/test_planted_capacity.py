"""Packed, planted and found again: the stream one by one, planted truth, fits of known lines."""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn import functional as F

from sae.errors import InputError
from sae.ops.capacity import greedy_lower_bound
from sae.ops.geometry import coherence
from sae.studies import planted_capacity
from sae.studies.planted_capacity import (
    LEARNERS,
    dictionary_learning,
    fit_exponential,
    fit_line,
    greedy_packing,
    planted_sweep,
    recovered,
    sparse_mixtures,
)

_SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "almost_orthogonal.py"
_SPEC = importlib.util.spec_from_file_location("almost_orthogonal_script", _SCRIPT)
script = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(script)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("patience", [1, 20, 400])
def test_packing_is_the_stream_taken_one_by_one(monkeypatch, patience):
    monkeypatch.setattr(planted_capacity, "_BLOCK", 64)
    packed = greedy_packing(16, 0.45, seeded(), patience)
    generator, kept, rejected = seeded(), [], 0
    while rejected < patience:
        for row in F.normalize(torch.randn(64, 16, generator=generator), dim=1):
            if rejected == patience:
                break
            if kept and (torch.stack(kept) @ row).abs().max() >= 0.45:
                rejected += 1
            else:
                kept.append(row)
                rejected = 0
    assert packed.is_full and packed.directions.equal(torch.stack(kept))


def test_packing_keeps_its_bound_its_cap_and_its_seed():
    packed = greedy_packing(32, 0.3, seeded(), patience=500)
    assert coherence(packed.directions) < 0.3
    assert greedy_lower_bound(32, 0.3) < len(packed.directions)
    capped = greedy_packing(32, 0.3, seeded(), patience=500, cap=17)
    assert not capped.is_full and capped.directions.equal(packed.directions[:17])


def test_mixtures_are_sums_of_directions_that_fire_by_themselves():
    rows = sparse_mixtures(torch.eye(10), 2000, 3, seeded())
    assert rows.shape == (2000, 10)
    fires = (rows > 0).double()
    assert rows[rows > 0].min() >= 0.5 and rows[rows > 0].max() <= 1.5
    assert fires.mean(0).tolist() == pytest.approx([0.3] * 10, abs=0.04)
    assert fires.sum(1).var().item() == pytest.approx(10 * 0.3 * 0.7, rel=0.1)  # as of a binomial number


def test_recovered_counts_planted_directions_once_and_either_way_round():
    planted = torch.eye(4)
    near = F.normalize(torch.tensor([[1.0, 0.3, 0.0, 0.0], [0.0, 0.0, 1.0, 0.9]]), dim=1)
    assert recovered(planted, torch.cat([near, near, -5 * planted[1:2]])) == 2


@pytest.mark.shapes_unchecked
@pytest.mark.parametrize("name", LEARNERS)
def test_learners_find_planted_directions_again(name, monkeypatch):
    monkeypatch.setattr(planted_capacity, "_STEPS", 600)
    (point,) = planted_sweep([16], 0.5, learn=LEARNERS[name], k=2, most_planted=24, rows_each=60)
    assert point.planted == 24 < point.found
    assert point.recovered >= 20


def test_the_script_fits_what_is_recovered_where_all_were_planted(capsys, monkeypatch):
    monkeypatch.setitem(LEARNERS, "sae", lambda rows, n, k: torch.cat([torch.zeros(1, rows.shape[1])]))
    monkeypatch.setitem(LEARNERS, "dictionary_learning", lambda rows, n, k: planted[rows.shape[1]])
    planted = {d: greedy_packing(d, 0.5, seeded(d), 100).directions for d in (8, 12, 16, 20)}
    asked = ["--epsilon", "0.5", "--dimensions", "8", "12", "16", "20", "--patience", "100", "--learn"]
    script.main([*asked, "dictionary_learning"])
    found, recovered = (line for line in capsys.readouterr().out.splitlines() if " = exp(" in line)
    assert found.replace("found", "recovered") == recovered  # a perfect learner's law is the packing's
    script.main([*asked, "dictionary_learning", "--most-planted", str(len(planted[16]) - 1)])
    printed = capsys.readouterr().out
    assert "recovered: only 2 d were not cut: no fit; raise --most-planted" in printed
    assert f"{len(planted[16]) - 1}/{len(planted[16]) - 1}" in printed
    script.main([*asked, "sae"])
    assert "recovered: only 0 d" in capsys.readouterr().out


def test_a_sweep_hands_the_learner_rows_of_the_packed_directions():
    asked = []

    def learn(rows, n, k):
        asked.append((rows.shape, n, k))
        return torch.linalg.qr(torch.randn(rows.shape[1], rows.shape[1])).Q

    points = list(planted_sweep([8, 16], 0.4, patience=50, learn=learn, k=2, most_planted=5, rows_each=10))
    assert [point.d for point in points] == [8, 16]
    assert asked == [((50, 8), 5, 2), ((50, 16), 5, 2)]
    only_packed = list(planted_sweep([8, 16], 0.4, patience=50))
    assert [p[:3] for p in points] == [p[:3] for p in only_packed]
    assert [p.planted for p in only_packed] == [0, 0]
    perfect = list(planted_sweep([16], 0.4, learn=lambda rows, n, k: rows[:1], most_planted=1, k=1))
    assert perfect[0].recovered == 1  # of a single direction every row is a multiple


def test_packings_grow_exponentially_and_not_in_proportion():
    dimensions = (12, 16, 20, 24, 28, 32)
    points = list(planted_sweep(dimensions, 0.5, patience=200, cap=3000))
    assert all(point.is_full for point in points)
    fit = fit_exponential([p.d for p in points], [p.found for p in points], 0.5)
    assert fit.low < fit.slope < fit.high
    assert 0.4 < fit.c < 0.9 and fit.c == pytest.approx(fit.c_greedy, rel=0.2)
    assert fit.linear_residual > 4 * fit.residual


def test_exponential_fit_of_exact_and_of_proportional_counts():
    d = [64, 96, 128, 192]
    fit = fit_exponential(d, [3 * math.exp(0.3 * 0.2**2 * one) for one in d], 0.2)
    assert fit.c == pytest.approx(0.3) and math.exp(fit.intercept) == pytest.approx(3)
    assert fit.slope == pytest.approx(0.3 * 0.2**2)
    assert fit.residual == pytest.approx(0, abs=1e-9) and fit.linear_residual > 0.1
    proportional = fit_exponential(d, [5 * one for one in d], 0.2)
    assert proportional.linear_residual == pytest.approx(0, abs=1e-9)
    assert proportional.residual > 0.01


def test_line_equals_the_textbook_one():
    # What is left over is 1/3, -2/3, 1/3.
    line = fit_line([0, 1, 2], [0, 0, 2])
    assert (line.slope, line.intercept) == pytest.approx((1, -1 / 3))
    assert line.residual == pytest.approx((2 / 3) ** 0.5)
    half = stats.t.ppf(0.95, 1) * (2 / 3 / 2) ** 0.5
    assert (line.low, line.high) == pytest.approx((1 - half, 1 + half))


def test_intervals_hold_the_truth_nine_times_in_ten():
    random = np.random.default_rng(0)
    x = np.arange(6)
    held = 0
    for _ in range(400):
        line = fit_line(x, 0.9 - 0.3 * x + 0.05 * random.standard_normal(len(x)))
        held += line.low <= -0.3 <= line.high
    assert held / 400 == pytest.approx(0.9, abs=0.04)


def test_studies_refuse_bad_input():
    with pytest.raises(InputError, match="needs 3 different points"):
        fit_line([1, 1, 2], [1, 2, 3])
    with pytest.raises(InputError, match="`counts` must be finite and positive"):
        fit_exponential([1, 2, 3], [1, 0, 2], 0.2)
    with pytest.raises(InputError, match="`patience` and `cap` must be at least 1"):
        greedy_packing(8, 0.5, seeded(), patience=0)
    with pytest.raises(InputError, match="`k` must be in"):
        sparse_mixtures(torch.eye(3), 5, 4, seeded())
    with pytest.raises(InputError, match=r"`epsilon` must be below 0\.62 to learn"):
        next(planted_sweep([8], 0.7, learn=dictionary_learning))


def test_script_prints_the_sweep_and_its_fit(capsys):
    script.main(
        ["--dimensions", "8", "12", "16", "32", "--epsilon", "0.5", "--patience", "100", "--cap", "300"]
    )
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "epsilon 0.5" and printed[1].split()[:3] == ["d", "basis", "found"]
    assert printed[5].split()[:3] == ["32", "32", ">300"]
    assert "c epsilon² d), c = 0." in printed[6] and "over 3 d" in printed[6]
    script.main(["--dimensions", "32", "--epsilon", "0.5", "--cap", "30"])
    assert "found: only 0 d were not cut: no fit; raise --cap" in capsys.readouterr().out


def test_script_prints_the_geometry_of_a_dictionary(tmp_path, capsys):
    from sae.dictionaries import TopK
    from sae.dictionaries.storage import save_dictionary

    save_dictionary(TopK(8, 32, k=2), tmp_path)
    script.main(["--dictionary", str(tmp_path), "--epsilon", "0.3", "0.9"])
    printed = capsys.readouterr().out
    assert printed.startswith("32 directions in 8 dimensions")
    assert [line.split()[0] for line in printed.splitlines()[-2:]] == ["0.3", "0.9"]
