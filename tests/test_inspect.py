"""scripts/inspect_features.py: every way of asking, runs under way, and bad questions."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from sae.errors import InputError
from sae.runs import open_run

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from train import main as train  # noqa: E402

_SPEC = importlib.util.spec_from_file_location("inspect_features", ROOT / "scripts" / "inspect_features.py")
_SCRIPT = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_SCRIPT)


@pytest.fixture(scope="module")
def run(tmp_path_factory, write_config):
    """A finished run on the tiny cache, with its report."""
    folder = tmp_path_factory.mktemp("runs")
    pca = {"class_path": "PCABaseline", "init_args": {"curve": [2, 8]}}
    train(["--config", str(write_config(folder, max_steps=30, val_check_interval=15, callbacks=[pca]))])
    return folder / "run"


@pytest.fixture
def copy(run, tmp_path):
    return shutil.copytree(run, tmp_path / "copy")


@pytest.fixture
def ask(monkeypatch, capsys):
    """What the script prints."""

    def ask(*arguments):
        monkeypatch.setattr(sys, "argv", ["inspect_features.py", *map(str, arguments)])
        _SCRIPT.main()
        return capsys.readouterr().out

    return ask


def test_the_run_has_a_report_evidence_and_losses(run):
    metrics = json.loads((run / "metrics.json").read_text())
    assert (run / "report" / "index.html").is_file() and (run / "evidence.safetensors").is_file()
    assert metrics["ce_increase"] == pytest.approx(metrics["ce_spliced"] - metrics["ce_clean"], abs=1e-6)
    assert metrics["kl"] > 0 and metrics["ce_mean_ablated"] > 0 and metrics["ce_increase_se"] > 0
    assert metrics["baselines"]["pca"]["kl"] > 0 and "ce_spliced" in metrics["baselines"]["pca"]
    page = (run / "report" / "index.html").read_text()
    assert "32 directions at resid.1" in page and f"{metrics['fvu']:.4g}" in page


def test_the_clearest_latents(run, ask):
    lines = ask(run, "--top", 3).splitlines()
    assert lines[0].split()[:3] == ["latent", "density", "clarity"] and 2 <= len(lines) <= 4


def test_one_latent_with_its_ablation(run, ask):
    alive = int(open_run(run).evidence().firings.argmax())
    page = ask(run, "--latent", alive)
    for part in (f"latent {alive}: fires on", "random directions", "right after", "strongest contexts", "KL"):
        assert part in page, part


def test_latents_of_a_token_and_of_a_text(run, ask):
    assert 'latents that fire on "e"' in ask(run, "--token", "e", "--top", 4)
    lines = ask(run, "--text", "red sea").splitlines()
    assert len(lines) == 9 and lines[1].startswith('"<|end|>"') and lines[2].startswith('"r"')


def test_evidence_is_gathered_once_and_again_for_other_weights(copy, monkeypatch):
    evidence = open_run(copy).evidence()
    monkeypatch.setattr("sae.runs.gather_evidence", lambda *_: pytest.fail("gathered again"))
    assert torch.equal(open_run(copy).evidence().firings, evidence.firings)
    run = open_run(copy)
    run.dictionary.b_enc += 0.1
    with pytest.raises(pytest.fail.Exception, match="gathered again"):
        run.evidence()


def test_a_report_goes_where_it_is_told_and_over_nothing_else(run, copy, ask, tmp_path):
    out = ask(run, "--report", tmp_path / "mine")
    assert (tmp_path / "mine" / "index.html").is_file() and str(tmp_path / "mine") in out
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="thesis|left untouched"):
        ask(copy, "--report", foreign)
    assert [p.name for p in foreign.iterdir()] == ["thesis.txt"]


def test_a_run_under_way_is_read_from_its_checkpoint_and_says_so(copy, ask):
    shutil.rmtree(copy / "dictionary")
    (copy / "evidence.safetensors").unlink()
    (copy / "metrics.json").write_text(
        json.dumps(json.loads((copy / "metrics.json").read_text()) | {"finished": False, "steps": 20})
    )
    out = ask(copy)
    assert "unfinished: what follows is its checkpoint at step 30" in out and "clarity" in out
    assert not (copy / "evidence.safetensors").exists()
    ask(copy, "--report")
    assert "This run is unfinished" in (copy / "report" / "index.html").read_text()


def test_the_checkpoint_of_an_unfinished_run_is_the_dictionary_trained_so_far(copy, run, tiny_cache):
    x = next(tiny_cache.batches("held_out", "resid.1", 200)).x
    expected = open_run(run).dictionary(x).x_hat
    shutil.rmtree(copy / "dictionary")
    torch.testing.assert_close(open_run(copy).dictionary(x).x_hat, expected)


def test_scores_of_an_unfinished_run_are_said_to_be_so(copy):
    metrics = json.loads((copy / "metrics.json").read_text())
    (copy / "metrics.json").write_text(json.dumps(metrics | {"finished": False}))
    assert open_run(copy).unfinished == "This run is unfinished: its scores are those of step 30."


def test_a_run_that_stopped_before_its_first_validation(copy, ask):
    shutil.rmtree(copy / "dictionary")
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(InputError, match="stopped before its first validation"):
        ask(copy)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (("--latent", "32"), "numbered 0 to 31, got 32"),
        (("--latent", "-1"), "numbered 0 to 31, got -1"),
        (("--token", "the"), "one token of the model's vocabulary"),
        (("--text", "x" * 40), "at most 31 tokens"),
        (("--top", "0"), "`--top` must be at least 1"),
    ],
)
def test_bad_questions(run, ask, arguments, match):
    with pytest.raises(InputError, match=match):
        ask(run, *arguments)


def test_no_run_there(ask, tmp_path):
    with pytest.raises(InputError, match="is not a run folder"):
        ask(tmp_path / "nothing")


def test_a_dictionary_of_another_width_is_an_error(copy, ask):
    import sae

    sae.save(sae.TopK(8, 32, 4), copy / "dictionary", hookpoint="resid.1", model="x")
    with pytest.raises(InputError, match="d_model=8, the cache .* has 16"):
        ask(copy)
