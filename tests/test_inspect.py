"""scripts/inspect_features.py: every way of asking, runs under way, and bad questions."""

import importlib.util
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

import sae
from sae.activations.contexts import held_out_token_ids
from sae.activations.hookpoints import visiting
from sae.activations.language_model import language_model_of
from sae.errors import InputError
from sae.reporting import is_reported, report_run
from sae.runs import Run, open_run

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from train import main as train  # noqa: E402

pytestmark = pytest.mark.shapes_unchecked

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
    _, *lines = ask(run, "--top", 3).splitlines()
    assert lines[0].split()[:3] == ["latent", "density", "clarity"] and 2 <= len(lines) <= 4


def test_the_clearest_come_first_once_for_each_token(run):
    reading = open_run(run).reading()
    found = reading.clearest(10)
    clarity = [round(r.summary.clarity, 3) for r in found]
    assert len(found) > 3 and clarity == sorted(clarity, reverse=True) and clarity[0] > clarity[-1]
    assert clarity[0] == max(round(float(c), 3) for c in reading.clarity)
    tokens = [r.input_tokens[0].token for r in found]
    assert len(set(tokens)) == len(tokens) and all(r.summary.firings >= 50 for r in found)


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
    for change in ("weights", "cache", "limit"):
        run = open_run(copy)
        if change == "weights":
            run.dictionary.b_enc += 0.1
        elif change == "cache":
            run.cache.manifest["fingerprint"] = "another"
        with pytest.raises(pytest.fail.Exception, match="gathered again"):
            run.evidence(max_tokens=500 if change == "limit" else None)


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
    ask(copy, "--report")
    assert "This run is unfinished" in (copy / "report" / "index.html").read_text()


def test_the_checkpoint_of_an_unfinished_run_is_the_dictionary_trained_so_far(copy, run, tiny_cache):
    x = next(tiny_cache.batches("held_out", "resid.1", 200)).x
    expected = open_run(run).dictionary(x).x_hat
    shutil.rmtree(copy / "dictionary")
    torch.testing.assert_close(open_run(copy).dictionary(x).x_hat, expected)


def test_a_run_continued_and_interrupted_is_read_from_its_checkpoint_not_its_earlier_end(copy, run):
    other = sae.TopK(16, 32, 4)
    sae.save(other, copy / "dictionary", hookpoint="resid.1", model="x")
    metrics = json.loads((copy / "metrics.json").read_text())
    (copy / "metrics.json").write_text(json.dumps(metrics | {"finished": False}))
    opened = open_run(copy)
    assert opened.unfinished == "This run is unfinished: what follows is its checkpoint at step 30."
    torch.testing.assert_close(opened.dictionary.directions, open_run(run).dictionary.directions)
    shutil.rmtree(copy / "checkpoints")
    opened = open_run(copy)
    assert opened.unfinished == "This run is unfinished: its dictionary was trained, but not yet scored."
    torch.testing.assert_close(opened.dictionary.directions, other.directions)


def test_losses_are_those_of_the_methods_at_their_l0(run, tiny_cache):
    """metrics.json against a direct computation."""
    metrics = json.loads((run / "metrics.json").read_text())
    opened = open_run(run)
    model = language_model_of(tiny_cache.manifest).model
    ids = held_out_token_ids(tiny_cache).long()
    moments = tiny_cache.moments("resid.1")
    pca = sae.PCA(16).fit([], moments)

    def loss(replacement):
        with torch.no_grad(), visiting(model, "resid.1", replacement):
            logits = model(input_ids=ids).logits[:, :-1]
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))

    def by_pca(x):
        rows = x.reshape(-1, 16)
        return pca.decode_sparse(pca.sparse_code(rows, round(metrics["l0"]))).reshape(x.shape)

    mean = moments.mean.float()
    assert metrics["ce_clean"] == pytest.approx(loss(lambda x: None), abs=1e-4)
    assert metrics["ce_mean_ablated"] == pytest.approx(loss(lambda x: mean.expand_as(x)), abs=1e-4)
    assert metrics["ce_spliced"] == pytest.approx(loss(lambda x: opened.dictionary(x).x_hat), abs=1e-4)
    assert metrics["baselines"]["pca"]["ce_spliced"] == pytest.approx(loss(by_pca), abs=1e-4)
    assert metrics["ce_tokens"] == ids.numel()


def test_a_reading_knows_which_positions_the_cache_lacks(without_first, tmp_path):
    dictionary = sae.TopK(16, 4, 4).requires_grad_(False)
    dictionary.b_enc.fill_(100.0)  # fires at every token
    reading = Run(tmp_path, dictionary, "resid.1", "tiny", without_first, None).reading()
    first, *others = reading.on_text("red").latents
    assert first == [] and all(len(row) == 4 for row in others)
    assert reading.evidence.rows == without_first.n_rows("train") == 175 * 31
    assert reading.summary(0).density == 1


def _again(folder, *arguments):
    train(["--config", str(folder / "config.yaml"), f"--trainer.default_root_dir={folder}", *arguments])


def test_a_report_that_is_not_of_the_run_as_it_is_now_is_written_again(copy):
    _again(copy)
    before = (copy / "report" / "index.html").stat().st_mtime_ns
    _again(copy)
    assert (copy / "report" / "index.html").stat().st_mtime_ns == before
    metrics = json.loads((copy / "metrics.json").read_text())
    (copy / "metrics.json").write_text(json.dumps(metrics | {"fvu": 0.123456}))
    _again(copy)
    assert "0.1235" in (copy / "report" / "index.html").read_text()


def test_fresh_never_removes_a_report_folder_that_is_not_ours(copy):
    shutil.rmtree(copy / "report")
    (copy / "report").mkdir()
    (copy / "report" / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="left untouched"):
        _again(copy, "--fresh")
    assert (copy / "report" / "thesis.txt").read_text() == "mine"
    assert (copy / "dictionary" / "config.json").is_file()


def test_a_model_that_has_moved_is_named_and_its_new_place_can_be_given(copy, ask, tmp_path, tiny_source):
    run = open_run(copy)
    run.cache.manifest["model"] = str(tmp_path / "gone")
    with pytest.raises(InputError, match="is not at hand; if it has moved, give --model FOLDER"):
        run.reading()
    assert run.reading(model=tiny_source.model).n_latents == 32
    assert "latents that fire on" in ask(copy, "--token", "e", "--model", tiny_source.model)
    with pytest.raises(InputError, match="could not be loaded"):
        ask(copy, "--token", "e", "--model", tmp_path / "nowhere")


def test_another_tokenizer_is_noticed(copy, tmp_path, tiny_source):
    changed = shutil.copytree(tiny_source.model, tmp_path / "model")
    swapped = json.loads((changed / "tokenizer.json").read_text())
    vocabulary = swapped["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    (changed / "tokenizer.json").write_text(json.dumps(swapped))
    with pytest.raises(InputError, match="another vocabulary than the cache"):
        open_run(copy).reading(model=str(changed))


def test_a_run_without_its_model_still_has_a_report_that_says_so(copy, tmp_path):
    run = open_run(copy)
    run.cache.manifest["model"] = str(tmp_path / "gone")
    text = report_run(run).read_text()
    assert "Latents were not read" in text and f"{run.dictionary.n_latents} directions" in text
    assert not is_reported(run)


def test_a_folder_that_cannot_be_written_is_no_end_of_reading(copy, monkeypatch, capsys):
    (copy / "evidence.safetensors").unlink()

    def refuse(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("sae.inspection.evidence.write_atomically", refuse)
    assert open_run(copy).reading().n_latents == 32
    assert "evidence was not kept" in capsys.readouterr().err


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
        (("--tokens", "0"), "`--tokens` must be at least 1"),
    ],
)
def test_bad_questions(run, ask, arguments, match):
    with pytest.raises(InputError, match=match):
        ask(run, *arguments)


def test_no_run_there(ask, tmp_path):
    with pytest.raises(InputError, match="is not a run folder"):
        ask(tmp_path / "nothing")


def test_a_dictionary_of_another_width_is_an_error(copy, ask):
    sae.save(sae.TopK(8, 32, 4), copy / "dictionary", hookpoint="resid.1", model="x")
    with pytest.raises(InputError, match="d_model=8, the cache .* has 16"):
        ask(copy)
