"""Figures draw what the data say, and go into an HTML page."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from torch.utils.tensorboard import SummaryWriter

from sae.inspection import figures


@pytest.fixture(autouse=True)
def drawn(draw_figure, monkeypatch):
    monkeypatch.setattr(Figure, "draw", draw_figure)


METRICS = {
    "fvu": 0.25, "l0": 4.0, "n_latents": 512, "ce_increase": 0.5,
    "baselines": {
        "pca": {"fvu": 0.5, "l0": 4.0, "n_latents": 16, "ce_increase": 1.5,
                "fvu_by_components": {"16": 0.0, "2": 0.9, "8": 0.4}},
        "nmf": {"fvu": 0.625, "l0": 3.9, "n_latents": 8, "ce_increase": None,
                "fvu_by_components": {"4": 0.7, "8": None}},
        "ica": {"fvu": None, "l0": 4.0, "n_latents": 16},
    },
}  # fmt: skip


def _heights(axes):
    names = [t.get_text() for t in axes.get_xticklabels()]
    return {
        name: (bar.get_height(), to_hex(bar.get_facecolor()))
        for name, bar in zip(names, axes.patches, strict=True)
    }


def test_components_figure_has_each_curve_and_each_method_at_equal_l0():
    axes = figures.fvu_by_components(METRICS).axes[0]
    drawn = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    assert set(drawn) == {
        "PCA, all of r components", "NMF, all of r components",
        "SAE, 4 of 512 directions", "PCA, 4 of 16 directions", "NMF, 3.9 of 8 directions",
    }  # fmt: skip
    assert drawn["PCA, all of r components"].get_xydata().tolist() == [[2, 0.9], [8, 0.4], [16, 0.0]]
    assert drawn["NMF, all of r components"].get_xydata().tolist() == [[4, 0.7]]
    assert drawn["SAE, 4 of 512 directions"].get_xydata().tolist() == [[4.0, 0.25]]
    assert drawn["NMF, 3.9 of 8 directions"].get_xydata().tolist() == [[3.9, 0.625]]
    for label, line in drawn.items():
        assert line.get_color() == figures.METHOD_COLOURS[label[:3].lower()]


def test_bars_are_as_high_as_the_scores_and_leave_out_what_is_not_known():
    fvu, ce = figures.methods_at_equal_l0(METRICS).axes
    colours = figures.method_colours(METRICS)
    assert _heights(fvu) == {
        m.upper(): (v, colours[m]) for m, v in (("sae", 0.25), ("pca", 0.5), ("nmf", 0.625))
    }
    assert _heights(ce) == {"SAE": (0.5, colours["sae"]), "PCA": (1.5, colours["pca"])}
    assert fvu.get_title(loc="left") == "FVU, L0 = 4" and "nats" in ce.get_title(loc="left")
    assert [t.get_text() for t in fvu.texts] == ["0.250", "0.500", "0.625"]


@pytest.mark.parametrize("without", [{}, {"ce_increase": None}])
def test_bars_have_no_panel_for_what_was_not_measured(without):
    metrics = {"fvu": 0.25, "l0": 4.0, "n_latents": 512, "baselines": {}} | without
    assert len(figures.methods_at_equal_l0(metrics).axes) == 1


def test_a_method_keeps_its_colour_and_no_two_share_one():
    colours = figures.method_colours(METRICS)
    assert len({colours[name] for name in ("sae", "pca", "nmf", "ica")}) == 4
    assert colours["pca"] == figures.method_colours({"baselines": {"pca": {}}})["pca"]


def test_density_histogram_counts_every_living_latent_and_names_the_dead():
    densities = torch.tensor([0.0, 1.0, 0.1, 0.1, 0.001, 0.0, 3e-5], dtype=torch.float64)
    axes = figures.density_histogram(densities).axes[0]
    assert axes.get_title(loc="left") == "Firing density of 7 latents, 2 dead"
    filled = [bar for bar in axes.patches if bar.get_height() > 0]
    assert sum(bar.get_height() for bar in filled) == 5
    for value, bar in zip(sorted({0.0, -1.0, -3.0, np.log10(3e-5)}), filled, strict=True):
        assert bar.get_x() - 1e-9 <= value <= bar.get_x() + bar.get_width() + 1e-9
    empty = figures.density_histogram(torch.zeros(3)).axes[0]
    assert empty.get_title(loc="left") == "Firing density of 3 latents, 3 dead" and not empty.patches


def test_neighbour_histogram_counts_every_direction():
    axes = figures.neighbour_histogram(torch.tensor([0.0, 0.31, 0.31, 0.5, 1.0])).axes[0]
    assert [b.get_height() for b in axes.patches if b.get_height()] == [1, 2, 1, 1]
    assert axes.get_title(loc="left") == "Nearest neighbours of 5 directions, median |cos| 0.31"


def test_training_curves_are_those_of_the_events_and_the_last_session_counts(tmp_path):
    assert figures.training_curves(tmp_path) is None
    for session, steps in enumerate(([10, 20, 30], [20, 30, 40])):  # the second resumes from step 10
        with SummaryWriter(str(tmp_path / "tensorboard"), filename_suffix=f".{session}") as writer:
            for step in steps:
                writer.add_scalar("train/fvu", session + 1 / step, step)
            writer.add_scalar("val/fvu", 0.5, 20)
    with SummaryWriter(str(tmp_path / "tensorboard"), filename_suffix=".2") as writer:
        writer.add_scalar("test/fvu", 0.25, 45)
    train, held_out = figures.training_curves(tmp_path).axes[0].get_lines()
    assert train.get_xdata().tolist() == [10, 20, 30, 40]
    assert train.get_ydata().tolist() == pytest.approx([0.1, 1.05, 1 + 1 / 30, 1.025])
    assert held_out.get_xydata().tolist() == [[20, 0.5], [45, 0.25]]


def test_training_curves_of_other_events_are_none(tmp_path):
    with SummaryWriter(str(tmp_path / "tensorboard")) as writer:
        writer.add_scalar("other", 1.0, 0)
    assert figures.training_curves(tmp_path) is None


def test_svg_is_the_same_every_time_and_shares_no_id_with_another():
    drawings = [figures.methods_at_equal_l0(METRICS), figures.fvu_by_components(METRICS)]
    first, second = (figures.to_svg(figure) for figure in drawings)
    assert first == figures.to_svg(drawings[0]) == figures.to_svg(figures.methods_at_equal_l0(METRICS))
    assert first.startswith("<svg ") and first.rstrip().endswith("</svg>")
    assert "<style" not in first and "metadata" not in first and "date" not in first
    ids = [re.findall(r'\bid="([^"]+)"', svg) for svg in (first, second)]
    assert all(len(found) == len(set(found)) > 0 for found in ids) and not set(ids[0]) & set(ids[1])
    for svg, own in zip((first, second), ids, strict=True):
        used = re.findall(r'(?:href="#|url\(#)([^")]+)', svg)
        assert used and set(used) <= set(own)
        text = [
            element.text for element in ElementTree.fromstring(svg).iter() if element.tag.endswith("}text")
        ]
        assert "SAE" in text or "SAE, 4 of 512 directions" in text


def test_figures_leave_no_trace_in_matplotlibs_state():
    import matplotlib

    before = dict(matplotlib.rcParams)
    figures.to_svg(figures.methods_at_equal_l0(METRICS))
    assert dict(matplotlib.rcParams) == before
