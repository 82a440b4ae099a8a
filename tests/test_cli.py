"""The front door: one command from model and text to a trained dictionary; its errors."""

import io
import json
import re
import shutil
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import jaxtyping
import pytest
import torch
from safetensors.torch import load_file, save_file

import sae
from sae.cli import SaeCLI, find_config
from sae.errors import InputError
from sae.runs import OUTPUTS, open_run
from sae.summary import summary

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from train import main  # noqa: E402

pytestmark = pytest.mark.shapes_unchecked
# Where a test is about something else.
_NO_REPORT = ["--trainer.callbacks=[]", "--report=false"]


class Finished(NamedTuple):
    """A run that a test may read, and write nothing to."""

    config: Path
    folder: Path
    printed: str


@pytest.fixture
def config(tmp_path, write_config):
    """A whole configuration on the tiny cache, quick to run."""
    return write_config(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, write_config):
    """The whole configuration, run to its end; of the runs here the one whose shapes are checked."""
    folder = tmp_path_factory.mktemp("finished")
    config, printed = write_config(folder), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(printed):
        patch.setattr(jaxtyping.config, "jaxtyping_disable", False)
        main(["--config", str(config)])
    return Finished(config, folder, printed.getvalue())


def _metrics(folder):
    return json.loads((folder / "run" / "metrics.json").read_text())


def _weights(folder):
    return sae.load(folder / "run").saved_tensors()


def test_one_command_leaves_the_whole_run_folder(finished):
    run = finished.folder / "run"
    for name in ("config.yaml", "metrics.json", "checkpoints/last.ckpt", "checkpoints/best.ckpt",
                 "dictionary/config.json", "dictionary/weights.safetensors"):  # fmt: skip
        assert (run / name).is_file(), name
    assert list((run / "tensorboard").glob("events*"))
    assert {path.name for path in run.iterdir()} <= set(OUTPUTS)
    metrics = _metrics(finished.folder)
    contract = {"fvu", "fvu_without_first_position", "l0", "dead_fraction", "cosine", "tokens_seen",
                "tokens_per_s", "wall_s", "d_model", "n_latents", "seed", "baselines"}  # fmt: skip
    assert contract <= set(metrics)
    assert metrics["finished"] and metrics["tokens_seen"] == 40 * 128 and metrics["tokens_per_s"] > 0
    assert 0 < metrics["fvu"] < 1 and metrics["l0"] <= 4
    for name, curve in (("pca", {"2", "8", "16"}), ("nmf", {"4", "8"})):
        row = metrics["baselines"][name]
        assert (
            0 < row["fvu"] < 1
            and row["l0"] <= round(metrics["l0"])
            and set(row["fvu_by_components"]) == curve
        )
    printed = finished.printed
    assert "SAE" in printed and "PCA" in printed and "NMF" in printed and "fires on" in printed
    saved = json.loads((run / "dictionary" / "config.json").read_text())
    assert saved["hookpoint"] == "resid.1" and saved["kind"] == "TopK" and saved["d_model"] == 16


def test_the_saved_dictionary_scores_what_metrics_say(finished, tiny_cache):
    x = torch.cat([batch.x for batch in tiny_cache.batches("held_out", "resid.1", 512)]).double()
    x_hat = sae.load(finished.folder / "run")(x.float()).x_hat.double()
    fvu = (x - x_hat).square().sum() / (x - x.mean(0)).square().sum()
    assert _metrics(finished.folder)["fvu"] == pytest.approx(fvu.item(), rel=1e-3)


def test_pca_callback_equals_scikit_learn(finished, tiny_cache):
    from sklearn.decomposition import PCA

    rows = {
        split: torch.cat([b.x for b in tiny_cache.batches(split, "resid.1", 512)]).double().numpy()
        for split in ("train", "held_out")
    }
    x = rows["held_out"]
    for r, fvu in _metrics(finished.folder)["baselines"]["pca"]["fvu_by_components"].items():
        reference = PCA(int(r)).fit(rows["train"])
        x_hat = reference.inverse_transform(reference.transform(x))
        assert fvu == pytest.approx(((x - x_hat) ** 2).sum() / ((x - x.mean(0)) ** 2).sum(), rel=1e-4)


def test_finished_run_shows_its_table_and_trains_no_more(finished, capsys):
    before = (finished.folder / "run" / "metrics.json").stat().st_mtime_ns
    main(["--config", str(finished.config)])
    again = capsys.readouterr().out
    assert "is finished" in again and finished.printed[finished.printed.index("held-out") :] in again
    assert (finished.folder / "run" / "metrics.json").stat().st_mtime_ns == before


def test_run_that_died_between_training_and_scoring_is_finished_by_the_same_command(
    config, tmp_path, monkeypatch
):
    import lightning

    def dies(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lightning.Trainer, "test", dies)
        with pytest.raises(KeyboardInterrupt):
            main(["--config", str(config)])
    trained = _weights(tmp_path)
    assert not _metrics(tmp_path)["finished"]
    main(["--config", str(config)])
    assert _metrics(tmp_path)["finished"] and torch.equal(trained["W_dec"], _weights(tmp_path)["W_dec"])


def test_tensorboard_has_one_chart_with_every_method(finished):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.custom_scalar.layout_pb2 import Layout

    events = EventAccumulator(str(finished.folder / "run" / "tensorboard")).Reload()
    (text,) = events.Tensors("custom_scalars__config__")[-1].tensor_proto.string_val
    charts = {c.title: c.multiline.tag for c in Layout.FromString(text).category[0].chart}
    drawn = {tag for pattern in charts["FVU"] for tag in events.Tags()["scalars"] if re.match(pattern, tag)}
    assert drawn == {"val/fvu", "test/fvu", "baseline/pca/fvu", "baseline/nmf/fvu"}
    methods = {"val/fvu": _metrics(finished.folder)}
    methods |= {f"baseline/{name}/fvu": row for name, row in _metrics(finished.folder)["baselines"].items()}
    for tag, row in methods.items():
        points = events.Scalars(tag)
        assert [e.step for e in points][:2] == [20, 40]
        assert points[-1].value == pytest.approx(row["fvu"], rel=1e-5)
    assert not [
        path for path in (finished.folder / "run" / "tensorboard").iterdir() if list(path.glob("events*"))
    ]
    curves = events.Tags()["scalars"]
    assert {"train/fvu", "val/fvu", "train/lr", "train/grad_norm", "train/dead_fraction"} <= set(curves)


def test_print_config_is_a_configuration_that_builds(config, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        SaeCLI(["--config", str(config), "--model.lr=0.01", "--print_config"])
    assert stop.value.code == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    again = SaeCLI(["--config", str(printed)])
    assert again.config.model.lr == 0.01 and again.config.data.batch_size == 128


def test_another_configuration_in_the_same_folder_is_refused_and_loses_nothing(finished):
    before = _weights(finished.folder)
    with pytest.raises(
        InputError, match=r"differs in model.dictionary.init_args.k \(was 4, now 5\), data.batch_size"
    ):
        main(["--config", str(finished.config), "--model.dictionary.init_args.k=5", "--data.batch_size=64"])
    assert torch.equal(before["W_dec"], _weights(finished.folder)["W_dec"])


def test_fresh_with_bad_input_keeps_the_run_that_is_there(config, tmp_path):
    main(["--config", str(config), *_NO_REPORT])
    before = _weights(tmp_path)
    with pytest.raises(InputError, match="'resid.9' is not in the cache"):
        main(["--config", str(config), "--fresh", "--data.hookpoint=resid.9"])
    assert torch.equal(before["W_dec"], _weights(tmp_path)["W_dec"]) and _metrics(tmp_path)["finished"]


def test_fresh_leaves_a_folder_that_holds_no_run_alone(config, tmp_path):
    (tmp_path / "run" / "report").mkdir(parents=True)
    (tmp_path / "run" / "report" / "thesis.tex").write_text("mine")
    main(["--config", str(config), "--fresh", *_NO_REPORT])
    assert (tmp_path / "run" / "report" / "thesis.tex").read_text() == "mine"


@pytest.mark.slow
def test_finished_run_prints_its_table_even_when_its_cache_is_gone(config, tmp_path, tiny_source, capsys):
    arguments = ["--config", str(config), f"--data.cache={tmp_path / 'own'}"]
    main(arguments)
    shutil.rmtree(tmp_path / "own")
    capsys.readouterr()
    main(arguments)
    printed = capsys.readouterr().out
    assert (
        summary(tmp_path / "run") in printed
        and "is gone; make it again with `python scripts/cache" in printed
    )


def test_latents_are_not_read_with_other_weights_than_the_caches(config, tmp_path, tiny_source):
    changed = tmp_path / "model"
    shutil.copytree(tiny_source.model, changed)
    arguments = [
        "--config",
        str(config),
        f"--data.source.model={changed}",
        f"--data.cache={tmp_path / 'own'}",
        *_NO_REPORT,
    ]
    main(arguments)
    weights = load_file(changed / "model.safetensors")
    save_file({k: v + 0.01 for k, v in weights.items()}, changed / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match="are not those that the cache was made with"):
        open_run(tmp_path / "run").reading()


@pytest.mark.parametrize(
    ("text", "match"), [("[1, 2", "cannot be read"), ("a: 1", "is not the configuration of a run")]
)
def test_damaged_config_of_a_run_is_an_error(config, tmp_path, text, match):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text(text)
    with pytest.raises(InputError, match=match):
        main(["--config", str(config)])


@pytest.mark.parametrize(("step", "says"), [(5, "starts over"), (27, "resumes from the last checkpoint")])
def test_ctrl_c_says_where_the_run_stands(config, tmp_path, monkeypatch, capsys, step, says):
    from sae.training import SparseAutoencoderModule

    real = SparseAutoencoderModule.training_step

    def interrupted(self, batch, batch_idx):
        if self.global_step == step:
            raise KeyboardInterrupt
        return real(self, batch, batch_idx)

    monkeypatch.setattr(SparseAutoencoderModule, "training_step", interrupted)
    with pytest.raises(SystemExit):
        main(["--config", str(config)])
    assert f"stopped at step {step}; the same command {says}" in capsys.readouterr().err


def test_a_single_callback_may_be_given_without_a_list(config, tmp_path):
    main(["--config", str(config), "--trainer.callbacks=PCABaseline", "--report=false"])
    assert set(_metrics(tmp_path)["baselines"]) == {"pca"}


def test_tokens_seen_count_accumulated_batches(config, tmp_path):
    arguments = ["--trainer.accumulate_grad_batches=2", "--trainer.max_steps=10"]
    main(["--config", str(config), *arguments, *_NO_REPORT])
    assert _metrics(tmp_path)["tokens_seen"] == 10 * 2 * 128


def test_runs_without_any_listed_callback(config, tmp_path):
    main(["--config", str(config), *_NO_REPORT])
    assert (
        _metrics(tmp_path)["baselines"] == {} and (tmp_path / "run" / "checkpoints" / "last.ckpt").is_file()
    )


def test_training_from_imported_rows_needs_no_language_model(config, tmp_path, capsys):
    from sae.activations.exchange.imported import import_rows

    import_rows(torch.randn(3000, 8), tmp_path / "rows")
    arguments = [f"--data.cache={tmp_path / 'rows'}", "--data.source=null", "--data.hookpoint=null"]
    main(["--config", str(config), *arguments])
    metrics = _metrics(tmp_path)
    assert metrics["d_model"] == 8 and metrics["fvu_without_first_position"] is None
    assert "no language model is named for them" in capsys.readouterr().out


@pytest.mark.slow
def test_weights_do_not_depend_on_what_was_drawn_before_training(config, tmp_path, monkeypatch):
    main(["--config", str(config)])
    expected = _weights(tmp_path)
    from sae.activations import ActivationDataModule

    real = ActivationDataModule.prepare_data
    monkeypatch.setattr(ActivationDataModule, "prepare_data", lambda self: (torch.rand(7), real(self))[1])
    main(["--config", str(config), "--fresh"])
    assert torch.equal(expected["W_dec"], _weights(tmp_path)["W_dec"])


def test_run_without_a_validation_before_its_end_still_finishes(config, tmp_path):
    arguments = ["--trainer.val_check_interval=500", "--trainer.max_steps=120"]
    main(["--config", str(config), *arguments, *_NO_REPORT])
    assert _metrics(tmp_path)["finished"] and _metrics(tmp_path)["steps"] == 120


@pytest.mark.slow
def test_finished_run_continues_to_a_larger_number_of_steps(config, tmp_path):
    main(["--config", str(config)])
    main(["--config", str(config), "--trainer.max_steps=60"])
    assert _metrics(tmp_path)["finished"] and _metrics(tmp_path)["steps"] == 60


def test_run_can_be_opened_and_read(finished):
    run = open_run(finished.folder / "run")
    assert run.hookpoint == "resid.1" and run.reading().latent(3).latent == 3


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--model.nonsense=1"], "nonsense"),
        (["--modle.lr=1"], "did you mean --model.lr"),
        (["--trainer.max_step=3"], "did you mean --trainer.max_steps"),
        (["--data.source.hookpoints=resid.1"], "data.source: .*hookpoints.* Got value: resid.1$"),
        (["--model.dictionary.init_args.k=33"], r"`k` must be in \[1, n_latents=32\], got k=33"),
        (["--data.batch_size=many"], "batch_size"),
        (["--data.source.dtype=float8"], "dtype"),
        (["--data.hookpoint=resid.7"], r"'resid.7' is not in the cache .* it has resid.1, resid.3"),
        (["--data.source.n_tokens=9000"], r"differs in n_tokens \(cache: 8000, config: 9000\)"),
        (["--data.cache=nowhere", "--data.source=null"], "does not exist and there is no `data.source`"),
        (["--model.dictionary.class_path=PCA"], "dictionary"),
        (["--data.source.held_out=0"], "`held_out` must lie between 0 and 1"),
        (["--data.batch_size=99999"], r"`batch_size` must be in \[1, "),
        (["--trainer.accelerator=gpu"], "CUDA|gpu|GPU"),
        (["--trainer.devices=0"], "devices"),
        (["--trainer.precision=bf16-true"], "`trainer.precision` bf16-true is not supported"),
        (["--trainer.max_steps=-1"], "the schedule needs an end"),
    ],
)
def test_bad_input_is_one_short_error_and_leaves_nothing(config, tmp_path, arguments, match):
    with pytest.raises(InputError, match=match) as caught:
        main(["--config", str(config), *arguments])
    assert len(str(caught.value)) <= 500 and "Traceback" not in str(caught.value)
    assert list((tmp_path / "run").glob("*")) == []


def test_config_is_found_by_bare_name_or_refused_with_those_there_are():
    assert find_config("quickstart.yaml").name == "quickstart.yaml"
    assert find_config("quickstart") == find_config("quickstart.yaml")
    with pytest.raises(InputError, match=r"'nope.yaml' is not a file.*it has .*quickstart.yaml"):
        find_config("nope.yaml")


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda p: p.name)
def test_every_config_builds(path, tmp_path):
    cli = SaeCLI(["--config", str(path), f"--trainer.default_root_dir={tmp_path}"])
    assert cli.trainer.max_steps > 0 and (cli.datamodule.source or cli.datamodule.world)


def test_the_command_exits_with_2_and_no_traceback():
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "--config", "nope.yaml"],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 2 and done.stderr.startswith("error: `--config` 'nope.yaml'")
    assert "Traceback" not in done.stderr and len(done.stderr.strip().splitlines()) <= 2


def test_no_configuration_is_an_error_that_says_what_to_give():
    with pytest.raises(InputError, match="give a configuration, e.g. --config quickstart.yaml"):
        SaeCLI([])


def test_help_fits_two_screens_and_help_all_has_the_trainer(capsys):
    lengths = []
    for option in ("--help", "--help_all"):
        with pytest.raises(SystemExit) as stop:
            SaeCLI([option])
        assert stop.value.code == 0
        lengths.append(len(capsys.readouterr().out.splitlines()))
    assert lengths[0] <= 100 < lengths[1]
