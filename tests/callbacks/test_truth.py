"""A run on rows of a world ends with its scores against the truth; other runs know of none."""

import json

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import sae
from sae.activations.synthetic import World, cached_truth, is_of_a_world, write_world
from sae.activations.synthetic.config import preset
from sae.ops.truth import TruthMetrics
from sae.ops.truth_rows import scores_of
from sae.summary import summary
from train import main

pytestmark = pytest.mark.shapes_unchecked


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Of two dictionaries, with PCA, on the tiny world."""
    folder = tmp_path_factory.mktemp("truth")
    cache = write_world(World(preset("tiny")), folder / "cache", n_rows=6000, held_out=0.1).location
    values = {
        "seed_everything": 0,
        "data": {"cache": str(cache), "batch_size": 256},
        "model": {
            "dictionaries": {
                "wide": {"class_path": "TopK", "init_args": {"n_latents": 256, "k": 3}},
                "narrow": {"class_path": "JumpReLU", "init_args": {"n_latents": 64, "target_l0": 2.0}},
            }
        },
        "trainer": {
            "max_steps": 60, "default_root_dir": str(folder / "run"), "val_check_interval": 30,
            "check_val_every_n_epoch": None, "accelerator": "cpu", "enable_progress_bar": False,
            "log_every_n_steps": 5,
            "callbacks": [{"class_path": "PCABaseline", "init_args": {"curve": [2]}}],
        },
    }  # fmt: skip
    (folder / "run.yaml").write_text(yaml.safe_dump(values, sort_keys=False))
    main(["--config", str(folder / "run.yaml")])
    return folder / "run"


def test_scores_are_those_of_the_saved_dictionary_on_the_held_out_rows(run):
    told = json.loads((run / "metrics.json").read_text())["dictionaries"]
    truth = cached_truth(run.parent / "cache")
    for name in ("wide", "narrow"):
        own, dictionary = told[name], sae.load(run / "dictionaries" / name)
        metrics = TruthMetrics(dictionary.directions, truth.world.directions, truth.world.parents)
        expected = scores_of(truth.held_out(), metrics, dictionary.encode_sparse, dictionary.decode_sparse)
        assert own["truth"] == pytest.approx(expected._asdict(), rel=1e-5)
        assert own["truth"]["l0"] == pytest.approx(own["l0"], rel=1e-5)  # the same rows
        assert own["truth"]["fvu"] == pytest.approx(own["fvu"], rel=1e-4)
        assert own["baselines"]["pca"]["truth"]["l0"] == own["baselines"]["pca"]["k"]
        chance, best = (own["truth_references"][of] for of in ("random directions", "true directions"))
        assert (chance["truth_f1"], best["truth_f1"], best["truth_mcc"]) == (0, 1, 1)
        between = (own["truth"]["f1"] - chance["truth"]["f1"]) / (best["truth"]["f1"] - chance["truth"]["f1"])
        assert own["truth_f1"] == pytest.approx(between)
    assert told["wide"]["truth_f1"] > told["wide"]["baselines"]["pca"]["truth_f1"]
    # Chance is judged at each one's own width.
    assert told["wide"]["truth_references"] != told["narrow"]["truth_references"]


def test_they_stand_in_the_table_and_in_tensorboard(run):
    lines = summary(run).splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("of the truth"))
    assert [line.split()[0] for line in lines[begin + 1 : begin + 9]] == ["wide", "PCA", "random", "true"] + [
        "narrow", "PCA", "random", "true",
    ]  # fmt: skip
    own = json.loads((run / "metrics.json").read_text())["dictionaries"]["wide"]
    assert (
        f"{own['truth_f1']:.4f}" in lines[begin + 1] and f"{own['truth']['recall']:.4f}" in lines[begin + 1]
    )
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert events.Scalars("test/wide/truth_f1")[0].value == pytest.approx(own["truth_f1"], rel=1e-5)
    assert len(events.Scalars("baseline/pca/narrow/truth_mcc")) == 1


def test_of_other_rows_no_truth_is_known(tiny_cache):
    assert not is_of_a_world(tiny_cache.location)
