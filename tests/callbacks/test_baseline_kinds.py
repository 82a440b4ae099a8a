"""Every baseline beside autoencoders of two seeds, in whole runs, and the table that compares them."""

import json
import math
import shutil

import pytest
import yaml

from sae.callbacks import DictionaryLearningBaseline, DirectionGeometry, NMFBaseline, PCABaseline
from sae.callbacks.baselines import check_names
from sae.errors import InputError
from sae.inspection.comparison_figures import natural_kurtosis
from sae.runs import finished_metrics
from sae.studies.comparison import compare, frontier_points, table
from scripts.almost_orthogonal import main as almost_orthogonal_main
from scripts.compare import main as compare_main
from train import main

CALLBACKS = [
    {"class_path": "PCABaseline", "init_args": {"curve": []}},
    {"class_path": "NMFBaseline", "init_args": {"n_components": 8, "curve": [], "max_rows": 1000}},
    *(
        {
            "class_path": "NMFBaseline",
            "init_args": {"n_components": 8, "curve": [], "max_rows": 1000, "signs": signs, "seeds": 2},
        }
        for signs in ("shift", "stack")
    ),
    {"class_path": "SemiNMFBaseline", "init_args": {"n_components": 24, "curve": [], "max_rows": 1000}},
    {"class_path": "ICABaseline", "init_args": {"max_rows": 1000}},
    {"class_path": "KMeansBaseline", "init_args": {"max_rows": 1000}},
    {"class_path": "DictionaryLearningBaseline", "init_args": {"max_rows": 1000}},
    {"class_path": "NaturalBaseline"},
    {"class_path": "RandomBaseline"},
    {"class_path": "DirectionGeometry", "init_args": {"epsilons": [0.3, 0.6], "orders": 2}},
]
NAMES = {
    "pca", "nmf", "nmf_shift", "nmf_stack", "semi_nmf", "ica", "kmeans", "dictionary_learning", "natural",
    "random",
}  # fmt: skip
pytestmark = [
    pytest.mark.filterwarnings("ignore:.* stopped after passes"),  # so few rows need not converge
    pytest.mark.slow,
    pytest.mark.shapes_unchecked,
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, write_config):
    folder = tmp_path_factory.mktemp("compared")
    for seed in (0, 1):
        values = yaml.safe_load(write_config(folder, seed=seed).read_text())
        del values["model"]["dictionary"]
        values["model"]["dictionaries"] = {
            f"sae_{k}": {"class_path": "TopK", "init_args": {"n_latents": 32, "k": k}} for k in (2, 4)
        }
        values["trainer"]["callbacks"] = CALLBACKS
        values["trainer"]["default_root_dir"] = str(folder / f"seed-{seed}")
        (folder / "run.yaml").write_text(yaml.safe_dump(values))
        main(["--config", str(folder / "run.yaml"), "--report=false"])
    return [folder / "seed-0", folder / "seed-1"]


def test_every_baseline_is_scored_at_the_l0_of_each_dictionary(runs):
    told = json.loads((runs[0] / "metrics.json").read_text())["dictionaries"]
    assert not (runs[0] / "report").exists()
    for name, k in (("sae_2", 2), ("sae_4", 4)):
        own = told[name]
        assert set(own["baselines"]) == NAMES
        for baseline, row in own["baselines"].items():
            assert row["k"] == k and row["l0"] <= k, baseline
            for key in ("fvu", "ce_increase", "purity", "purity_null", "bits_per_token", "cancellation"):
                assert math.isfinite(row[key]), (baseline, key)
            assert 0 <= row["cancellation"] <= 1 and row["purity_null"] <= 1
        of = own["baselines"]
        assert of["natural"]["cancellation"] == 0.0  # coordinates do not meet
        assert natural_kurtosis(own) is not None and natural_kurtosis({"baselines": {}}) is None
        for key in ("kurtosis", "kurtosis_rotated"):
            assert len(of["natural"][key]) == 21 and of["natural"][key] == sorted(of["natural"][key])
        assert (of["random"]["n_latents"], of["dictionary_learning"]["n_latents"]) == (32, 32)
        assert of["nmf_stack"]["stability"] is not None and of["nmf"]["stability"] is None
        # Learned directions beat random ones; the wide rivals are coded by a pursuit, so they set the mark.
        assert of["dictionary_learning"]["fvu"] < of["random"]["fvu"]
    for name in NAMES:
        fvu = [told[of]["baselines"][name]["fvu"] for of in ("sae_2", "sae_4")]
        assert fvu[1] <= fvu[0] * (1 + 1e-6), name


def test_geometry_stands_beside_its_nulls(runs):
    own = json.loads((runs[0] / "metrics.json").read_text())["dictionaries"]["sae_4"]["geometry"]
    assert set(own["sets"]) == {"sae", "random", "pca", "W_E", "W_U"}
    assert own["sets"]["random"]["n"] == own["sets"]["sae"]["n"] and own["sets"]["pca"]["coherence"] < 1e-4
    assert own["sets"]["sae"]["cofirings"]["pairs"] > 0
    for row in own["almost_orthogonal"]:
        assert 1 <= row["found"] <= own["sets"]["sae"]["n"] and row["pca"] == 16
        assert row["random_signs_bound"] <= row["upper_bound"]


def test_the_table_has_every_method_once_an_l0(runs):
    rows = compare({run: finished_metrics(run) for run in runs})
    assert len(rows) == 2 * (len(NAMES) + 1) and len({(row.method, row.l0) for row in rows}) == len(rows)
    trained = [row for row in rows if row.trained]
    assert {row.method for row in trained} == {"sae_2", "sae_4"}
    assert all(len(row.scores["fvu"]) == 2 and len(row.scores["stability"]) == 2 for row in trained)
    again = {row.method: row.scores["stability"] for row in rows if row.l0 == 4}
    assert all(len(shares) == 2 and 0 <= min(shares) <= max(shares) <= 1 for shares in again.values())
    assert again["PCA"] == again["natural basis"] == [1, 1] and max(again["random directions"]) < 0.5
    text = table(rows)
    assert text.count("\n") == len(rows) + 1 and "**sae_4**" in text and "NMF shift" in text
    assert {2.0, 4.0} == {x for x, _ in frontier_points(rows)["sae"]}
    assert frontier_points(rows, "bits_per_token")["PCA"][0][0] > 2 * 9


def test_the_script_tables_runs_that_are_there(runs, capsys):
    compare_main(["--runs", *map(str, runs)])
    assert "2 seeds, held-out rows" in capsys.readouterr().out
    folder = runs[0].parent
    assert (folder / "comparison.md").is_file() and "<svg" in (folder / "frontier-l0.svg").read_text()
    rows = json.loads((folder / "comparison.json").read_text())
    assert len(rows) == 2 * (len(NAMES) + 2)
    fvu = {row["method"]: row["scores"]["fvu"] for row in rows if row["l0"] == 4}
    searched = fvu["sae_4, searched"]
    assert len(searched) == 2 and all(a < b for a, b in zip(searched, fvu["sae_4"], strict=True))


def test_the_table_needs_no_cache_but_says_what_it_misses_without(runs, capsys, monkeypatch):
    def gone(folder, device=None, dictionary=None):
        raise InputError("the cache of this run is gone.")

    monkeypatch.setattr("scripts.compare.open_run", gone)
    compare_main(["--runs", *map(str, runs)])
    printed = capsys.readouterr()
    assert "No dictionary was coded by a search: the cache of this run is gone." in printed.err
    assert "sae_4" in printed.out and "searched" not in printed.out.replace("coded by a search", "")


def test_the_table_needs_no_checkpoint_but_says_what_it_misses_without(runs, tmp_path, capsys):
    copies = [shutil.copytree(run, tmp_path / run.name) for run in runs]
    (copies[0] / "checkpoints" / "last.ckpt").write_bytes(b"torn")
    rows = compare({run: finished_metrics(run) for run in copies})
    assert "What seeds find again of the baselines is not told: " in capsys.readouterr().err
    fitted_twice = {"NMF shift", "NMF stack"}
    assert {row.method for row in rows if "stability" in row.scores} == {"sae_2", "sae_4"} | fitted_twice


def test_the_script_counts_sets_of_what_both_seeds_found(runs, capsys):
    folders = ["--runs", *map(str, runs), "--epsilon", "0.3", "0.9"]
    almost_orthogonal_main([*folders, "--name", "sae_4"])
    assert "32 latents in 16 dimensions, 2 seeds:" in capsys.readouterr().out
    with pytest.raises(InputError, match="`--runs` must be two or more that differ by their seed"):
        almost_orthogonal_main(["--runs", str(runs[0]), "--name", "sae_4"])


def test_a_second_run_finds_the_fits_of_the_first(runs, tiny_cache):
    kept = list((tiny_cache.place.local("manifest.json").parent / "baselines").iterdir())
    assert {path.name.partition("-")[0] for path in kept} >= {"NMF", "SemiNMF", "ICA", "KMeans"}


def test_runs_that_cannot_be_compared_are_errors(runs, tmp_path):
    with pytest.raises(InputError, match="holds no finished run"):
        compare_main(["--runs", str(tmp_path)])
    with pytest.raises(InputError, match="must be at least one run folder"):
        compare({})
    with pytest.raises(InputError, match="`--runs` trains nothing, so --data.batch_size=3 has no meaning"):
        compare_main(["--runs", str(runs[0]), "--data.batch_size=3"])
    with pytest.raises(InputError, match="`--seeds` must be at least 1"):
        compare_main(["--seeds", "0"])


def test_two_baselines_of_one_name_are_an_error():
    with pytest.raises(InputError, match="`trainer.callbacks` has 2 baselines named nmf_stack"):
        check_names([NMFBaseline(signs="stack"), PCABaseline(), NMFBaseline(signs="stack", seeds=2)])
    check_names([NMFBaseline(signs="stack"), NMFBaseline(), "something else"])


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: DirectionGeometry(epsilons=[0.2, 1.5]), r"`epsilons` must be in \(0, 1\), got 1.5"),
        (lambda: DirectionGeometry(orders=0), "`orders` must be at least 1"),
        (lambda: DictionaryLearningBaseline(k=0), "`k` must be at least 1, or several such, got k=0"),
        (lambda: DictionaryLearningBaseline(k=[4, 0]), "`k` must be at least 1, or several"),
        (lambda: DictionaryLearningBaseline(k=[]), "`k` must be at least 1, or several"),
    ],
)
def test_settings_out_of_range_are_errors(make, match):
    with pytest.raises(InputError, match=match):
        make()
