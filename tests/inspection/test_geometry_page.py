"""The report's page of geometry says what metrics.json holds, and nothing where there is nothing."""

import pytest

from sae.inspection.geometry_page import geometry_page

ALONE = {
    "n": 1_234,
    "d_model": 8,
    "nearest": [0.1, 0.2, 0.3456, 0.4, 0.5],
    "nearest_mean": 0.3,
    "coherence": 0.7654,
    "welch": 0.1239,
    "mean_square": 0.02,
    "frame_potential": 1.357,
    "effective_rank": 7.25,
    "participation_ratio": 6.0,
    "antipodal_pairs": 1_002,
    "effective_size": None,
    "cofirings": None,
}
FIRING = ALONE | {"effective_size": 987.6, "cofirings": {"pairs": 10, "mean_square": 0.04, "mean_abs": 0.1}}
BOUNDS = {"random_signs_bound": 3.2, "greedy_bound": None, "upper_bound": 8.4e10}


@pytest.fixture
def geometry():
    return {
        "quantiles": [0.05, 0.25, 0.5, 0.75, 0.95],
        "null": [0.1, 0.2, 0.3, 0.4, 0.5],
        "sets": {"sae": FIRING, "random": ALONE},
        "almost_orthogonal": [
            {"epsilon": 0.2, "found": 1_500, "random": 12, **BOUNDS},
            {"epsilon": 0.3, "found": 1_600, "random": 13, **BOUNDS},
        ],
    }


def test_rows_say_what_was_measured(geometry):
    neighbours, sets = geometry_page(geometry)
    own, random = neighbours.rows
    assert own[1:] == ["1,234", "0.346", "0.765", "0.124", "1.36", "7.2", "1,002", "0.200", "988"]
    assert random[1:] == own[1:8] + ["–", "–"]  # as many random ones never fire
    assert len(neighbours.head) == len(own)
    assert [row[:3] for row in sets.rows] == [["0.2", "1,500", "12"], ["0.3", "1,600", "13"]]
    assert sets.rows[0][3:] == ["–", "8.4e+10"] and len(sets.head) == len(sets.rows[0])


def test_each_table_has_its_figure(geometry):
    for grid in geometry_page(geometry):
        assert "<svg" in grid.svg


def test_sets_that_were_not_measured_have_no_column(geometry):
    for row in geometry["almost_orthogonal"]:
        del row["random"]
    _, sets = geometry_page(geometry)
    assert [row[:2] for row in sets.rows] == [["0.2", "1,500"], ["0.3", "1,600"]]
    assert len(sets.head) == len(sets.rows[0]) == 4
