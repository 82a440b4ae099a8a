"""What almost-orthogonal sets leave: dictionaries whose sets are known, and laws that are planted."""

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sae.dictionaries import TopK
from sae.errors import InputError
from sae.ops.moments import StreamingMoments
from sae.studies import tradeoff
from sae.studies.tradeoff import Subset, fit_tradeoff, subsets, table
from scripts import widths as script

D, EPSILONS = 8, [0.2, 0.3, 0.4]


def _made(directions):
    """A dictionary of these directions, and rows that are sums of two of the first D."""
    dictionary = TopK(D, len(directions), k=2)
    dictionary.W_dec.data.copy_(directions)
    rows = torch.eye(D).repeat_interleave(D, 0) + 0.5 * torch.eye(D).repeat(D, 1)
    moments = StreamingMoments()
    moments.add(rows)
    dictionary.set_input_statistics(torch.zeros(D), 1.0)
    return dictionary, rows, moments.moments().mean


def test_a_set_is_coded_alone_and_beside_as_many_at_random():
    between = torch.stack([torch.eye(D)[i] + torch.eye(D)[i + 1] for i in (0, 2, 4, 6)]) / 2**0.5
    dictionary, rows, mean = _made(torch.cat([between, torch.eye(D)]))
    alive = torch.ones(12, dtype=torch.bool)
    small, whole = subsets(dictionary, alive, [0.1, 0.999], 2, lambda: rows.split(10), mean)
    assert (small.n_latents, small.alive, small.size, whole.size) == (12, 12, 8, 12)
    assert small.fvu < 1e-10 < 0.01 < small.fvu_random  # the basis alone is orthogonal, and writes all rows
    assert whole.fvu == whole.fvu_random < 1e-10  # one and the same
    alive[4] = False  # a direction that nothing else stands for
    (without,) = subsets(dictionary, alive, [0.999], 2, lambda: rows.split(10), mean)
    assert without.size == 11 and without.fvu > 1e-3


def test_a_set_smaller_than_k_is_coded_with_all_of_it():
    dictionary, rows, mean = _made(torch.eye(D))
    alive = torch.zeros(D, dtype=torch.bool)
    alive[3] = True
    one = subsets(dictionary, alive, [0.5], 4, lambda: [rows], mean)[0]
    left = rows.square().sum() - rows[:, 3].square().sum()
    assert one.fvu == pytest.approx((left / (rows - mean.float()).square().sum()).item(), rel=1e-4)


def _planted(c=0.2, width=0.05, noise=0.0, seed=0):
    random = np.random.default_rng(seed)
    return [
        Subset(
            n, n, e, 4, math.exp(-c * e**2 * 64 + noise * random.standard_normal()) * (n / 64) ** width, 0.5
        )
        for n in (32, 64, 128, 256)
        for e in (0.1, 0.2, 0.3)
    ]


def test_the_law_is_that_of_the_sets_where_epsilon_binds():
    whole = [Subset(64, 64, 0.5, 40, 1e-9, 0.5), Subset(64, 64, 0.6, 64, 1e-9, 0.5)]  # width binds there
    law = fit_tradeoff([*_planted(), *whole], 64)
    assert (law.c, law.width) == pytest.approx((0.2, 0.05)) and law.n_sets == 12
    assert law.residual < 1e-9 and law.at(0.3, 128, 64) == pytest.approx(math.exp(-0.2 * 0.09 * 64) * 2**0.05)


def test_intervals_hold_the_truth_about_nine_times_in_ten():
    laws = [fit_tradeoff(_planted(noise=0.05, seed=seed), 64) for seed in range(200)]
    assert 0.84 <= sum(law.c_low <= 0.2 <= law.c_high for law in laws) / 200 <= 0.96
    assert 0.84 <= sum(law.width_low <= 0.05 <= law.width_high for law in laws) / 200 <= 0.96


def test_too_few_sets_are_no_law():
    with pytest.raises(InputError, match="needs 6 sets or more, of two widths or more.*ask for smaller"):
        fit_tradeoff(_planted()[:5], 64)
    with pytest.raises(InputError, match="of two widths or more"):
        fit_tradeoff([one for one in _planted() if one.n_latents == 64] * 3, 64)
    assert "No law: a law of FVU against epsilon needs" in table(_planted()[:3], 64)


def _run(tmp_path):
    """A finished run of four widths with their geometry."""
    told = {}
    for i, n in enumerate((4, 8, 16, 32)):
        sizes = [{"epsilon": e, "found": 4, "random": 4} for e in EPSILONS]
        geometry = {"almost_orthogonal": sizes, "sets": {"sae": {"n": n}}}
        told[f"n{n}"] = {"n_latents": n, "l0": 2.0, "fvu": 0.5 / (i + 1), "geometry": geometry}
    (tmp_path / "metrics.json").write_text(json.dumps({"finished": True, "d_model": D, "dictionaries": told}))
    return tmp_path


def test_the_script_codes_the_sets_of_every_width(tmp_path, monkeypatch, capsys):
    def opened(folder, dictionary):
        generator = torch.Generator().manual_seed(0)
        unit = torch.nn.functional.normalize(torch.randn(int(dictionary[1:]), D, generator=generator), dim=1)
        made, rows, mean = _made(unit)
        batches = lambda split, hookpoint, size: (SimpleNamespace(x=some) for some in rows.split(16))  # noqa: E731
        cache = SimpleNamespace(batches=batches, moments=lambda hookpoint: SimpleNamespace(mean=mean))
        return SimpleNamespace(dictionary=made, cache=cache, hookpoint="resid.0")

    monkeypatch.setattr(script, "open_run", opened)
    script.main([str(_run(tmp_path))])
    told = json.loads((tmp_path / "widths.json").read_text())
    assert [(one["n_latents"], one["epsilon"]) for one in told["sets"]] == [
        (n, e) for n in (4, 8, 16, 32) for e in EPSILONS
    ]
    assert (
        told["tradeoff"]["n_sets"] >= tradeoff.FEWEST and "ε² d_model" in (tmp_path / "widths.md").read_text()
    )
    assert "<svg" in (tmp_path / "epsilons.svg").read_text()
    assert "and epsilons.svg" in capsys.readouterr().out
    with pytest.raises(InputError, match="`--rows` must be at least 1, got 0"):
        script.main([str(tmp_path), "--rows", "0"])


def test_the_script_says_what_it_misses_without_a_cache(tmp_path, monkeypatch, capsys):
    def gone(folder, dictionary):
        raise InputError("the cache of this run is gone.")

    monkeypatch.setattr(script, "open_run", gone)
    script.main([str(_run(tmp_path))])
    printed = capsys.readouterr()
    assert "No set was coded: the cache of this run is gone." in printed.err
    assert "epsilons.svg" not in printed.out and not (tmp_path / "epsilons.svg").exists()
    assert "| 16 | 2 | 16 |" in printed.out
