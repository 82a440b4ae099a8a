"""What width buys: on scores that are made up so that the law is known."""

import json

import numpy as np
import pytest

from sae.errors import InputError
from sae.studies.widths import fit_law, law_of, table, widths_of
from scripts.widths import main

WIDTHS = (32, 64, 128, 256, 512)


def _metrics(widths=WIDTHS, exponent=0.5):
    def row(n):
        sizes = [
            {"epsilon": 0.2, "found": n // 4, "random": n // 2},
            {"epsilon": 0.4, "found": n, "random": n},
        ]
        geometry = {"almost_orthogonal": sizes, "sets": {"sae": {"n": n - 1}}}
        return {"n_latents": n, "l0": 4.0, "fvu": 0.05 + 2 * n**-exponent, "geometry": geometry}

    return {"finished": True, "d_model": 64, "dictionaries": {f"n{n}": row(n) for n in widths}}


def test_the_law_is_that_of_the_scores():
    widths = widths_of(_metrics(WIDTHS[::-1]))
    assert [width.n_latents for width in widths] == list(WIDTHS)  # by width, whatever the order in the run
    law = law_of(widths)
    assert (law.floor, law.scale, law.exponent) == pytest.approx((0.05, 2, 0.5), rel=1e-3)
    assert law.low == pytest.approx(0.5, rel=1e-3) == law.high and law.residual < 1e-5
    assert law.straight_residual > 0.01 and law.at(1) == pytest.approx(2.05, rel=1e-3)
    assert (widths[2].alive, widths[2].found[0.2], widths[2].random[0.2]) == (127, 32, 64)


def test_without_a_floor_none_is_found():
    law = fit_law([10, 100, 1000, 10_000], [0.5, 0.05, 0.005, 0.0005])
    assert law.exponent == pytest.approx(1, rel=1e-3) and law.floor < 1e-5 and law.straight_residual < 1e-9


def test_intervals_hold_the_truth_about_nine_times_in_ten():
    random = np.random.default_rng(0)
    n = 2 ** np.arange(5, 13)
    held = 0
    for _ in range(100):
        fvu = (0.05 + 3 * n**-0.7) * np.exp(0.02 * random.standard_normal(len(n)))
        law = fit_law(n.tolist(), fvu.tolist())
        held += law.low <= 0.7 <= law.high
    assert 82 <= held <= 98


def test_the_table_has_a_line_a_width_and_a_column_an_epsilon():
    text = table(widths_of(_metrics()))
    assert "| 128 | 2 | 127 | 0.2268 | 32 (64) | 128 (128) |" in text
    assert (
        "FVU = 0.05 + 2 n^-0.500, 90 % interval of the exponent 0.500 to 0.500" in text
        and "d_model = 64" in text
    )


def test_the_script_writes_table_data_and_figure(tmp_path, capsys):
    (tmp_path / "metrics.json").write_text(json.dumps(_metrics()))
    main([str(tmp_path)])
    assert "| 256 | 4 | 255 |" in capsys.readouterr().out
    assert (tmp_path / "widths.md").read_text().startswith("| n_latents |")
    assert json.loads((tmp_path / "widths.json").read_text())["law"]["exponent"] == pytest.approx(
        0.5, rel=1e-3
    )
    assert "<svg" in (tmp_path / "widths.svg").read_text()


def test_runs_without_widths_or_geometry_are_errors():
    with pytest.raises(InputError, match="must have 4 or more dictionaries and their geometry"):
        widths_of(_metrics(WIDTHS[:3]))
    metrics = _metrics()
    del metrics["dictionaries"]["n64"]["geometry"]
    with pytest.raises(InputError, match="list them under `model.dictionaries`, and DirectionGeometry"):
        widths_of(metrics)
    with pytest.raises(InputError, match="`fvu` must be finite and positive"):
        fit_law([1, 2, 3, 4], [0.3, 0.2, 0.1, 0.0])
