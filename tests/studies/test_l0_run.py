"""`model.target_l0`: a number or auto, from the configuration to the run folder and back."""

import json
from functools import partial

import pytest
import yaml

import sae
from sae.cli import SaeCLI
from sae.dictionaries import BatchTopK, JumpReLU, ReLU, TopK
from sae.errors import InputError
from sae.runs import open_run
from sae.studies import l0_run
from sae.studies.l0_search import choose_l0
from sae.training.target_l0 import TargetL0, most_l0
from train import main

pytestmark = pytest.mark.shapes_unchecked


@pytest.fixture
def config(tmp_path, write_config):
    """Writes the quick configuration with another `model.dictionary` and `target_l0`."""

    def write(asked="auto", kind="TopK", **init_args):
        path = write_config(tmp_path, callbacks=[])
        values = yaml.safe_load(path.read_text())
        values["model"] |= {
            "dictionary": {"class_path": kind, "init_args": {"n_latents": 32, **init_args}},
            "target_l0": asked,
        }
        path.write_text(yaml.safe_dump(values))
        return str(path)

    return write


@pytest.fixture
def searches(monkeypatch):
    """Makes searches short, and counts them."""
    done = []

    def short(*args, **kwargs):
        done.append(1)
        return choose_l0(*args, **{**kwargs, "steps": 8, "batch_size": 64, "progress": False})

    monkeypatch.setattr(l0_run, "choose_l0", short)
    return done


def test_auto_chooses_once_and_keeps_it(config, searches, tmp_path, capsys):
    path = config()
    main(["--config", path, "--checkpoint_every", "20"])
    assert "L0 chosen from the data: " in capsys.readouterr().out
    run = tmp_path / "run"
    found = json.loads((run / "l0_search.json").read_text())
    metrics = json.loads((run / "metrics.json").read_text())
    saved = json.loads((run / "dictionary" / "config.json").read_text())
    assert found["low"] <= found["value"] <= found["high"] and found["candidates"]
    assert saved["k"] == found["value"] and metrics["l0"] <= found["value"]
    assert metrics["l0_chosen"] == {name: found[name] for name in ("value", "low", "high", "at_the_edge")}
    main(["--config", path, "--trainer.max_steps", "60"])  # goes on from the checkpoint
    assert len(searches) == 1
    assert json.loads((run / "l0_search.json").read_text()) == found
    assert sae.load(run).k == found["value"]


@pytest.mark.slow
def test_a_resumed_run_takes_the_value_that_is_kept(config, searches, tmp_path):
    """Even where a new search would find another: the file decides."""
    path = config(kind="BatchTopK")
    main(["--config", path, "--checkpoint_every", "20", "--trainer.max_steps", "20"])
    file = tmp_path / "run" / "l0_search.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"value": 7}))
    with pytest.raises(InputError, match="this run trains"):  # the checkpoint is of the value that was
        main(["--config", path])
    assert len(searches) == 1


@pytest.mark.slow
def test_fresh_searches_again(config, searches, tmp_path):
    path = config()
    main(["--config", path, "--trainer.max_steps", "5"])
    main(["--config", path, "--trainer.max_steps", "5", "--fresh"])
    assert len(searches) == 2


@pytest.mark.slow
def test_other_data_are_searched_again(config, searches, tmp_path):
    """A file that an interrupted start left behind counts for its own data only."""
    (tmp_path / "run").mkdir()
    stale = {"about": {"cache": "another"}, "value": 7, "low": 7, "high": 7, "at_the_edge": False}
    (tmp_path / "run" / "l0_search.json").write_text(json.dumps(stale))
    main(["--config", config(), "--trainer.max_steps", "5"])
    assert len(searches) == 1


@pytest.mark.parametrize("target_l0", [3, "auto"])
def test_an_unfinished_run_opens(config, searches, tmp_path, monkeypatch, target_l0):
    from sae.training import SparseAutoencoderModule

    real = SparseAutoencoderModule.training_step

    def dies(self, batch, batch_idx):
        if self.global_step == 15:
            raise KeyboardInterrupt
        return real(self, batch, batch_idx)

    monkeypatch.setattr(SparseAutoencoderModule, "training_step", dies)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        main(["--config", config(target_l0), "--checkpoint_every", "10"])
    run = open_run(tmp_path / "run", "cpu")
    assert run.unfinished
    assert target_l0 == "auto" or run.dictionary.config["k"] == 3


@pytest.mark.parametrize(
    ("kind", "name", "init_args"),
    [("TopK", "k", {}), ("BatchTopK", "k", {}), ("MatryoshkaBatchTopK", "k", {}), ("ReLU", "target_l0", {}),
     ("Gated", "target_l0", {}), ("JumpReLU", "target_l0", {"penalty": "quadratic"})],
)  # fmt: skip
def test_a_number_goes_to_the_argument_of_the_kind(config, kind, name, init_args):
    cli = SaeCLI(["--config", config(3, kind, **init_args)])
    assert cli.model.build(16)["dictionary"].config[name] == 3
    assert cli.config_values["model"]["target_l0"] == 3


def test_plan_with_auto_takes_the_largest_and_says_so(config, capsys, tmp_path):
    main(["--config", config(), "--plan"])
    assert "planned at 8, the largest" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("target_l0", "kind", "init_args", "message"),
    [
        ("auto", "ReLU", {"sparsity_coefficient": 0.1}, "where `sparsity_coefficient` is fixed"),
        ("auto", "TopK", {"k": 4}, "`k` is given"),
        (4, "JumpReLU", {"target_l0": 4}, "`target_l0` is given"),
        (0, "TopK", {}, "`k` must be in \\[1"),
        (33, "BatchTopK", {}, "`k` must be in \\[1, n_latents=32\\], got k=33"),
        (-1.5, "ReLU", {}, "`target_l0` must be in \\(0"),
        (2.5, "TopK", {}, "whole number for TopK"),
        (None, "TopK", {}, "`k` must be given"),
        (None, "BatchTopK", {}, "`k` must be given"),
    ],
)
def test_bad_values_are_named(config, target_l0, kind, init_args, message):
    with pytest.raises(InputError, match=message):
        SaeCLI(["--config", config(target_l0, kind, **init_args)])


def test_a_kind_that_cannot_be_seen_is_refused():
    with pytest.raises(InputError, match="kind can be seen"):
        TargetL0("auto").filled(lambda d_model: TopK(d_model, 8, 2))


def test_fractions_reach_kinds_that_take_them():
    for kind in (BatchTopK, ReLU, JumpReLU):
        assert TargetL0(2.5).filled(partial(kind, n_latents=32))(8).entries_per_row == 2.5


def test_without_a_target_nothing_changes():
    make = partial(TopK, n_latents=32, k=3)
    assert TargetL0().filled(make) is make and not TargetL0().is_open


def test_largest_l0_looked_at():
    assert [most_l0(n) for n in (2, 32, 400, 100_000)] == [1, 8, 100, 128]


def test_script_prints_the_table(config, searches, monkeypatch, capsys):
    import importlib.util
    from pathlib import Path

    file = Path(__file__).resolve().parents[2] / "scripts" / "choose_l0.py"
    spec = importlib.util.spec_from_file_location("choose_l0_script", file)
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    script.main(["--config", config(4)])
    printed = capsys.readouterr().out
    assert "projection" in printed and "agreement" in printed and "L0 chosen from the data" in printed
