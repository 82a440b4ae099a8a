"""The board: names of entries, the table by hand, and boards of a small world that go on where they ended."""

import importlib.util
import json
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import lightning
import pytest
import torch

from sae.activations.synthetic import PRESETS, WorldConfig
from sae.callbacks import Checkpoints
from sae.dictionaries import BatchTopK, JumpReLU, Refined, TopK, load_dictionary
from sae.errors import InputError
from sae.exits import exit_on_input_error
from sae.studies import board as board_module
from sae.studies.board import Board, BoardRunner
from sae.studies.board_table import COLUMNS, NORMALISED, markdown, rows_of, write_hparams
from sae.studies.entries import ALL, FROZEN, RANDOM, REFERENCES, TRUTH, Entry, entry_named
from sae.training import SparseAutoencoderModule

pytestmark = pytest.mark.shapes_unchecked

_SPEC = importlib.util.spec_from_file_location(
    "leaderboard", Path(__file__).parents[2] / "scripts" / "leaderboard.py"
)
leaderboard = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(leaderboard)

MICRO = WorldConfig(n_features=24, d_model=16, mean_l0=2.0, min_rate=0.02, n_trees=2, depth=1, max_cosine=0.5)
SMALL = Board("micro", samples=2_000, batch_size=100, held_out_rows=400)


@pytest.fixture(autouse=True)
def micro(monkeypatch):
    """A world that costs nothing; and nothing of Lightning's seeding is left behind."""
    monkeypatch.setitem(PRESETS, "micro", MICRO)
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):
        monkeypatch.setenv(name, "0")


@pytest.fixture
def no_training(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("this has been trained before")

    return lambda: monkeypatch.setattr(lightning.Trainer, "fit", refuse)


# --- names of entries


@pytest.mark.parametrize(
    ("name", "kind", "revival", "refined_by"),
    [
        ("TopK", "TopK", None, None),
        ("TopK:none", "TopK", (), None),
        ("BatchTopK:auxk+minfire", "BatchTopK", ("auxk", "minfire"), None),
        ("JumpReLU>omp", "JumpReLU", None, "omp"),
        ("TopK:resample>gradient_pursuit", "TopK", ("resample",), "gradient_pursuit"),
        ("TopK>fista", "TopK", None, "fista"),
        ("PCA", "PCA", None, None),
        ("NMF", "NMF", None, None),
        (FROZEN, FROZEN, None, None),
        (f"{FROZEN}:none>omp", FROZEN, (), "omp"),
        (RANDOM, RANDOM, None, None),
        (TRUTH, TRUTH, None, None),
    ],
)
def test_names_of_entries_are_read(name, kind, revival, refined_by):
    assert entry_named(name) == Entry(name, kind, revival, refined_by)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("TopKK", "`entries` must be among .*got 'TopKK'"),
        ("", "`entries` must be among .*got ''"),
        ("Refined", "got 'Refined'"),
        ("PCA>omp", "got 'PCA>omp'"),
        ("NMF:auxk", "got 'NMF:auxk'"),
        (f"{TRUTH}>omp", "got 'true directions>omp'"),
        ("PCA>", "got 'PCA>'"),
        ("TopK>lasso", "there is no pursuit 'lasso'"),
        ("TopK>", "there is no pursuit ''"),
        ("TopK:", "`revival` must list"),
        ("TopK:magic", "`revival` must list"),
        ("TopK:auxk+auxk", "`revival` must list"),
        ("TopK:none+auxk", "`revival` must list"),
        (f"{FROZEN}:resample", "cannot resample"),
    ],
)
def test_names_of_nothing_are_refused(name, told):
    with pytest.raises(InputError, match=told):
        entry_named(name)


def test_entries_make_their_kind_at_the_l0():
    assert all(entry_named(name) for name in ALL) and not set(ALL) & set(REFERENCES)
    made = entry_named("TopK").make(2.6, 24)(16)
    assert isinstance(made, TopK) and made.k == 3 and made.n_latents == 24
    made = entry_named("BatchTopK").make(2.6, 24)(16)
    assert isinstance(made, BatchTopK) and made.k == 2.6
    made = entry_named("JumpReLU").make(2.6, 24)(16)
    assert isinstance(made, JumpReLU) and made.target_l0 == 2.6
    assert isinstance(entry_named(FROZEN).make(0.2, 24)(16), TopK)
    assert entry_named(FROZEN).make(0.2, 24)(16).k == 1
    trained = [name for name in (*ALL, *REFERENCES) if entry_named(name).is_trained]
    assert set(trained) == set(ALL) - {"PCA", "NMF"}


# --- the table


def _result(entry, seed, **scores):
    known = {"f1": 0.5, "mcc": 0.5, "l0": 2.0, "absorption": None, "fvu": 0.25}
    return {
        "entry": entry,
        "seed": seed,
        "seconds": 10.0 + seed,
        "scores": {**dict.fromkeys(COLUMNS, 0.0), **known, **scores},
    }


def _made_up(truth=0.95):
    return [
        _result(RANDOM, 0, f1=0.1, mcc=0.3),
        _result(RANDOM, 1, f1=0.2, mcc=0.3),
        _result(TRUTH, 0, f1=truth, mcc=1.0),
        _result("TopK", 0, f1=0.5, mcc=0.6, absorption=0.2),
        _result("TopK", 1, f1=0.6, mcc=0.7),
        _result("TopK", 2, f1=0.7, mcc=0.8),
    ]


def test_rows_are_means_and_standard_errors_best_first():
    rows = rows_of(_made_up())
    assert [row["entry"] for row in rows] == [TRUTH, "TopK", RANDOM]
    truth, topk, random = rows
    assert (topk["seeds"], topk["seconds"], truth["seeds"]) == (3, 11.0, 1)
    assert topk["scores"]["f1"] == {"mean": pytest.approx(0.6), "se": pytest.approx(0.1 / 3**0.5)}
    assert truth["scores"]["f1"] == {"mean": 0.95, "se": None}
    assert topk["scores"]["absorption"] == {"mean": 0.2, "se": None}
    assert random["scores"]["absorption"] == {"mean": None, "se": None}
    assert random["normalised"]["f1"]["mean"] == pytest.approx(0)
    assert truth["normalised"].keys() == set(NORMALISED)
    assert truth["normalised"]["f1"] == truth["normalised"]["mcc"] == {"mean": 1.0, "se": None}
    assert topk["normalised"]["f1"]["mean"] == pytest.approx((0.6 - 0.15) / 0.8)
    assert topk["normalised"]["f1"]["se"] == pytest.approx(0.1 / 3**0.5 / 0.8)
    assert topk["normalised"]["mcc"]["mean"] == pytest.approx((0.7 - 0.3) / 0.7)


def test_table_has_a_cell_for_every_column():
    text = markdown("micro: a title", rows_of(_made_up()))
    lines = text.splitlines()
    assert lines[0] == "### micro: a title"
    table = [line for line in lines if line.startswith("|")]
    raw, normalised = table[:5], table[5:]
    assert len(normalised) == 2 + 3
    assert {line.count("|") for line in raw} == {len(COLUMNS) + 3}
    assert {line.count("|") for line in normalised} == {len(NORMALISED) + 3}
    assert raw[0].startswith("|  | F1 | MCC | F1 rare |") and raw[0].endswith("| dead | s |")
    cells = raw[3].split(" | ")
    assert cells[0] == "| TopK" and cells[1] == "0.600 ± 0.058" and cells[-1] == "11 |" and "0.250" in cells
    assert normalised[3].split(" | ")[1] == "0.562 ± 0.072"
    assert normalised[2].split(" | ")[1] == "1.000" and "–" in raw[4].split(" | ")
    assert "does not count" not in text


def test_a_board_whose_truth_is_out_of_reach_says_so():
    text = markdown("t", rows_of(_made_up(truth=0.85)))
    assert "The true directions themselves reach an F1 of 0.850 only: this board does not count." in text


def test_where_truth_is_no_better_than_chance_nothing_is_normalised():
    rows = rows_of([_result(RANDOM, 0), _result(TRUTH, 0)])
    assert rows[0]["normalised"]["f1"] == {"mean": None, "se": None}
    assert "–" in markdown("t", rows)


def test_hparams_are_one_run_for_each_result_however_often(tmp_path):
    results = [_result("TopK:none>omp", 0, fvu=math.nan), _result(RANDOM, 1)]
    for _ in range(2):
        write_hparams(tmp_path, "micro", results)
    runs = sorted(path.name for path in (tmp_path / "tensorboard").iterdir())
    assert runs == ["TopK:none_by_omp-seed0", "random_directions-seed1"]
    counts = [len(list((tmp_path / "tensorboard" / run).glob("events*"))) for run in runs]
    assert max(counts) <= 2  # one of the writer, one of its hparams


# --- boards of a small world


def _scores(runner, name, seed=0):
    return runner.result(entry_named(name), seed)["scores"]


def test_references_frame_the_board(tmp_path):
    runner = BoardRunner(SMALL, tmp_path)
    random, truth, pca = (_scores(runner, name) for name in (RANDOM, TRUTH, "PCA"))
    assert truth["f1"] > 0.9 and truth["mcc"] == pytest.approx(1.0, abs=1e-4)
    assert random["f1"] < 0.6 and random["mcc"] < 0.7 and pca["f1"] < truth["f1"]
    assert pca["l0"] == pytest.approx(2.0)
    assert _scores(runner, RANDOM, 1) != random


def test_what_is_done_is_not_done_again(tmp_path, no_training):
    runner = BoardRunner(SMALL, tmp_path)
    first = [runner.result(entry_named(name), 0) for name in ("TopK>omp", "PCA")]
    no_training()
    again = BoardRunner(SMALL, tmp_path)
    assert [again.result(entry_named(name), 0) for name in ("TopK>omp", "PCA")] == first
    encoded = again.result(entry_named("TopK"), 0)  # the same training, by its encoder
    assert encoded["scores"]["mcc"] == pytest.approx(first[0]["scores"]["mcc"])
    trained = json.loads((tmp_path / "trained" / "TopK-seed0" / "seconds.json").read_text())
    assert encoded["seconds"] >= trained > 0
    more_rows = BoardRunner(replace(SMALL, held_out_rows=500), tmp_path)
    assert _scores(more_rows, "TopK") != encoded["scores"]  # scored anew, from the same training
    assert (tmp_path / "results" / "TopK_by_omp-seed0.json").is_file()


@pytest.mark.parametrize("changed", [{"samples": 1_500}, {"l0": 3.0}, {"n_latents": 20}, {"batch_size": 50}])
def test_other_settings_train_again(changed, tmp_path, no_training):
    _scores(BoardRunner(SMALL, tmp_path), "TopK")
    no_training()
    with pytest.raises(AssertionError, match="trained before"):
        _scores(BoardRunner(replace(SMALL, **changed), tmp_path), "TopK")
    with pytest.raises(AssertionError, match="trained before"):
        _scores(BoardRunner(SMALL, tmp_path), "TopK", seed=1)


def _break_at(monkeypatch, step):
    whole = SparseAutoencoderModule.training_step

    def breaking(self, *args, **kwargs):
        if self.trainer.global_step == step:
            raise RuntimeError("the power is gone")
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(SparseAutoencoderModule, "training_step", breaking)


def _steps_of_fits(monkeypatch):
    """The step that each training began at."""
    begun = []
    whole = SparseAutoencoderModule.on_train_start

    def noting(self, *args, **kwargs):
        begun.append(self.trainer.global_step)
        return whole(self, *args, **kwargs)

    monkeypatch.setattr(SparseAutoencoderModule, "on_train_start", noting)
    return begun


@pytest.mark.parametrize("name", ["TopK:auxk+resample", FROZEN])
def test_an_interrupted_training_goes_on_to_the_same_result(name, tmp_path, monkeypatch):
    monkeypatch.setattr(board_module, "Checkpoints", lambda folder, every: Checkpoints(folder, every=5))
    uninterrupted = _scores(BoardRunner(SMALL, tmp_path / "whole"), name)
    with monkeypatch.context() as broken:
        _break_at(broken, 13)
        with pytest.raises(RuntimeError, match="the power is gone"):
            _scores(BoardRunner(SMALL, tmp_path / "broken"), name)
    begun = _steps_of_fits(monkeypatch)
    assert _scores(BoardRunner(SMALL, tmp_path / "broken"), name) == uninterrupted
    assert begun == [10]
    folder = name.replace(" ", "_").replace(":", "-") + "-seed0"
    a, b = (
        load_dictionary(tmp_path / which / "trained" / folder / "dictionary").W_dec
        for which in ("whole", "broken")
    )
    assert torch.equal(a, b)


@pytest.mark.parametrize("step", [2, 7])
def test_nothing_of_other_settings_is_taken_after_an_interruption(step, tmp_path, monkeypatch):
    """Settings change, and the new training is interrupted: neither the old dictionary nor its checkpoint."""
    monkeypatch.setattr(board_module, "Checkpoints", lambda folder, every: Checkpoints(folder, every=5))
    changed = replace(SMALL, samples=1_000, l0=3.0)
    expected = _scores(BoardRunner(changed, tmp_path / "fresh"), "TopK")
    _scores(BoardRunner(SMALL, tmp_path / "used"), "TopK")
    with monkeypatch.context() as broken:
        _break_at(broken, step)
        with pytest.raises(RuntimeError, match="the power is gone"):
            _scores(BoardRunner(changed, tmp_path / "used"), "TopK")
    begun = _steps_of_fits(monkeypatch)
    assert _scores(BoardRunner(changed, tmp_path / "used"), "TopK") == expected
    assert begun == [0 if step < 5 else 5]


def test_frozen_directions_stay_where_they_began(tmp_path):
    runner = BoardRunner(SMALL, tmp_path)
    _scores(runner, FROZEN)
    trained = load_dictionary(tmp_path / "trained" / "frozen_decoder-seed0" / "dictionary")
    assert isinstance(trained, TopK)
    torch.manual_seed(0)
    begun = entry_named(FROZEN).make(runner.l0, runner.n_latents)(16)
    assert torch.equal(trained.W_dec, begun.W_dec)
    assert not torch.allclose(trained.W_enc_rows, begun.W_enc_rows, atol=1e-3)


@pytest.mark.parametrize("method", ["omp", "fista"])
def test_searched_codes_are_at_the_boards_l0(method, tmp_path):
    runner = BoardRunner(SMALL, tmp_path)
    scores = _scores(runner, f"TopK>{method}")
    assert scores["l0"] == pytest.approx(2.0, abs=0.05 if method == "omp" else 0.3)
    refined = runner._refined(load_dictionary(tmp_path / "trained" / "TopK-seed0" / "dictionary"), method)
    assert isinstance(refined, Refined) and (refined.penalty is None) == (method == "omp")


def test_training_says_nothing(tmp_path, capfd, caplog):
    _scores(BoardRunner(SMALL, tmp_path), "TopK")
    told = capfd.readouterr()
    assert told.out == told.err == "" and caplog.text == ""


# --- bad input


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"world": "none"}, "`world` must be one of"),
        ({"samples": 0}, "`samples` must be at least 1, got 0"),
        ({"samples": 50}, "`samples` must be at least the batch of 100, got 50"),
        ({"batch_size": 0}, "`batch_size` must be at least 1"),
        ({"held_out_rows": 0}, "`held_out_rows` must be at least 1"),
        ({"n_latents": 0}, "`n_latents` must be at least 1, got 0"),
        ({"l0": 0.0}, r"`l0` must be in \(0, n_latents=24\], got 0.0"),
        ({"l0": 25.0}, r"`l0` must be in \(0, n_latents=24\], got 25.0"),
        ({"l0": math.nan}, "`l0` must be in"),
    ],
)
def test_boards_that_cannot_be_are_refused(changed, told, tmp_path):
    with pytest.raises(InputError, match=told):
        BoardRunner(replace(SMALL, **changed), tmp_path)


@pytest.mark.parametrize("device", ["toaster", "cpu:x", ""])
def test_devices_that_there_are_not_are_refused(device, tmp_path):
    with pytest.raises(InputError, match="`device` '.*' cannot be used: "):
        BoardRunner(SMALL, tmp_path, device)


# --- the command


def _asked(out, *more):
    given = ["--world", "micro", "--samples", "2000", "--batch-size", "100", "--out", str(out)]
    return [*given, "--entries", "PCA", "TopK>omp", *more]


def test_command_writes_the_board_and_goes_on(tmp_path, monkeypatch, capsys, no_training):
    monkeypatch.setattr(leaderboard, "Board", partial(Board, held_out_rows=300))
    leaderboard.main(_asked(tmp_path, "--seeds", "2"))
    told = capsys.readouterr().out
    text = (tmp_path / "board.md").read_text()
    assert text in told and text.startswith(
        "### micro: 24 features in 16 dimensions, 24 latents, 2,000 samples, L0 2.00, 2 seeds\n"
    )
    saved = json.loads((tmp_path / "board.json").read_text())
    seeds = {row["entry"]: row["seeds"] for row in saved["rows"]}
    assert seeds == {RANDOM: 2, TRUTH: 1, "PCA": 1, "TopK>omp": 2}
    assert saved["rows"] == json.loads(json.dumps(rows_of(_results_in(tmp_path))))
    runs = sorted(path.name for path in (tmp_path / "tensorboard").iterdir())
    assert runs == sorted(
        [f"random_directions-seed{s}" for s in (0, 1)]
        + ["true_directions-seed0", "PCA-seed0"]
        + [f"TopK_by_omp-seed{s}" for s in (0, 1)]
    )
    no_training()
    leaderboard.main(_asked(tmp_path, "--seeds", "2", "--entries", "TopK>omp", "PCA", "PCA"))
    assert (tmp_path / "board.md").read_text() == text


def _results_in(folder):
    return [json.loads(path.read_text()) for path in sorted((folder / "results").glob("*.json"))]


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (["--seeds", "0"], "error: `seeds` must be at least 1, got 0."),
        (["--entries", "TopKK"], "error: `entries` must be among"),
        (["--world", "none"], "error: `world` must be one of"),
        (["--device", "toaster"], "error: `device` 'toaster' cannot be used"),
        (["--l0", "-1"], "error: `l0` must be in"),
        (["--n-latents", "0"], "error: `n_latents` must be at least 1"),
    ],
)
def test_bad_input_ends_with_2_and_one_line(more, told, tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        exit_on_input_error(lambda: leaderboard.main(_asked(tmp_path, *more)))
    message = capsys.readouterr().err
    assert ended.value.code == 2 and message.startswith(told) and message.count("\n") == 1
    assert not (tmp_path / "board.md").exists()


@pytest.mark.slow
def test_a_board_of_the_tiny_world(tmp_path):
    runner = BoardRunner(Board("tiny", samples=20_000, held_out_rows=2_000), tmp_path)
    results = [runner.result(entry_named(name), 0) for name in (*REFERENCES, "PCA", "TopK>omp")]
    rows = {row["entry"]: row for row in rows_of(results)}
    assert rows[TRUTH]["scores"]["f1"]["mean"] > 0.95
    assert rows["TopK>omp"]["scores"]["f1"]["mean"] > rows[RANDOM]["scores"]["f1"]["mean"]
    assert "does not count" not in markdown("tiny", list(rows.values()))
