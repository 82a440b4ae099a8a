"""What a run writes to TensorBoard: read from the event files, and as TensorBoard itself serves it."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from unittest import mock
from urllib.parse import quote
from urllib.request import Request, urlopen

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from torch.nn import functional as F

import sae
from sae.callbacks import PCABaseline, RunFolder, TensorBoardPanels
from sae.cli import SaeCLI
from sae.dictionaries import TopK
from sae.inspection.projector import write_projector
from sae.ops.geometry import nearest_neighbour_cosines
from sae.training import SparseAutoencoderModule
from sae.training.learner import Learner
from sae.training.names import SINGLE

pytestmark = pytest.mark.shapes_unchecked

QUANTITIES = {
    "FVU": "fvu",
    "FVU without first position": "fvu_without_first_position",
    "cosine": "cosine",
    "dead fraction": "dead_fraction",
    "L0": "l0",
}
OF_CODES = {
    "bits per token": "bits_per_token",
    "token purity": "purity",
    "token purity by chance": "purity_null",
    "cancellation": "cancellation",
    "time to fit (s)": "fit_s",
}
FIGURES = {"fvu_by_components", "methods_at_equal_l0", "densities", "nearest_neighbours", "training_curves"}


@pytest.fixture(scope="module")
def config(tmp_path_factory, write_config):
    """A whole configuration on the tiny cache, quick to run; its run folder is beside it."""
    folder = tmp_path_factory.mktemp("tensorboard-run")
    return write_config(folder, seed=3, lr=0.002, max_steps=20, val_check_interval=10)


def _train(arguments, checkpoint=None):
    """Trains and scores, and makes no report."""
    cli = SaeCLI(arguments)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule, ckpt_path=checkpoint, weights_only=True)
    cli.trainer.test(cli.model, datamodule=cli.datamodule, verbose=False)


@pytest.fixture(scope="module")
def run(config):
    """The folder of a finished run whose directions have been named."""
    _train(["--config", str(config)])
    folder = config.parent / "run"
    directions = sae.load(folder).directions
    names = [[str(i), f"token\t{i}\n"] for i in range(len(directions))]
    for step in (19, 20):
        write_projector(folder, directions, names, ["latent", "fires on"], step)
    return folder


def _events(folder):
    size = {"tensors": 0, "scalars": 0, "histograms": 0, "images": 0}
    return EventAccumulator(str(folder), size_guidance=size).Reload()


def _metrics(run):
    return json.loads((run / "metrics.json").read_text())


def _layout(events):
    tensors = events.Tensors("custom_scalars__config__")
    (text,) = tensors[-1].tensor_proto.string_val
    return Layout.FromString(text)


def _start_info(events):
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    return HParamsPluginData.FromString(content).session_start_info


def _check_layout(layout, metrics):
    """Each chart's tags match exactly one quantity, of every method."""
    (category,) = layout.category
    expected = dict(QUANTITIES)
    if metrics.get("ce_increase") is not None:
        expected |= {"CE increase (nats)": "ce_increase", "KL (nats)": "kl"}
    if metrics.get("bits_per_token") is not None:
        expected |= OF_CODES
    assert [chart.title for chart in category.chart] == list(expected)
    for chart in category.chart:
        key = expected[chart.title]
        methods = ["(val|test)", "baseline/pca", "baseline/nmf"]
        assert list(chart.multiline.tag) == [f"^{method}/{key}$" for method in methods]


def test_every_method_is_in_one_chart_of_each_quantity(run):
    events = _events(run / "tensorboard")
    _check_layout(_layout(events), _metrics(run))
    tags = set(events.Tags()["scalars"])
    for key in QUANTITIES.values():
        assert {f"val/{key}", f"test/{key}", f"baseline/pca/{key}", f"baseline/nmf/{key}"} <= tags
    # The methods' points lie above one another.
    assert [e.step for e in events.Scalars("val/fvu")] == [10, 20]
    assert {e.step for e in events.Scalars("baseline/pca/fvu")} == {10, 20}
    assert events.Scalars("test/fvu")[-1].value == pytest.approx(_metrics(run)["fvu"], rel=1e-6)


def test_histograms_hold_the_living_latents_and_every_direction(run):
    events = _events(run / "tensorboard")
    densities = events.Histograms("latents/log10_density")
    assert [e.step for e in densities] == [10, 20]
    alive = round(32 * (1 - _metrics(run)["dead_fraction"]))
    assert densities[-1].histogram_value.num == alive and densities[-1].histogram_value.max <= 0
    (neighbours,) = events.Histograms("latents/nearest_neighbour_cosine")
    cosines = nearest_neighbour_cosines(sae.load(run).directions)
    assert neighbours.histogram_value.num == 32
    assert neighbours.histogram_value.sum == pytest.approx(float(cosines.sum()), rel=1e-4)


def test_figures_are_drawn_once_at_the_end(run):
    events = _events(run / "tensorboard")
    assert set(events.Tags()["images"]) == {f"figures/{name}" for name in FIGURES}
    assert all([e.step for e in events.Images(f"figures/{name}")] == [20] for name in FIGURES)


def test_hyperparameters_are_those_of_the_run(run):
    start = _start_info(_events(run / "tensorboard"))
    values = {name: v.string_value or v.number_value for name, v in start.hparams.items()}
    assert values == {
        "kind": "TopK", "n_latents": 32, "k": 4, "lr": 0.002, "batch_size": 128, "hookpoint": "resid.1",
        "model": _metrics_model(run), "seed": 3, "max_steps": 20,
    }  # fmt: skip


def _metrics_model(run):
    return json.loads((run / "dictionary" / "config.json").read_text())["model"]


def test_continued_run_replaces_its_hyperparameters_and_its_charts(config, tmp_path):
    arguments = ["--config", str(config), f"--trainer.default_root_dir={tmp_path}"]
    _train([*arguments, "--trainer.max_steps=10"])
    _train([*arguments, "--trainer.max_steps=20"], tmp_path / "checkpoints" / "last.ckpt")
    events = _events(tmp_path / "tensorboard")
    assert _start_info(events).hparams["max_steps"].number_value == 20
    _check_layout(_layout(events), _metrics(tmp_path))
    assert len(list((tmp_path / "tensorboard").glob("*.hparams"))) == 1
    assert {path.parent.name for path in tmp_path.rglob("events*")} == {"tensorboard"}


@pytest.mark.parametrize("logger", ["false", "CSVLogger"])
def test_run_without_tensorboard_works_and_writes_none(config, tmp_path, logger):
    arguments = ["--config", str(config), f"--trainer.default_root_dir={tmp_path}", "--trainer.callbacks=[]"]
    more = [f"--trainer.logger={logger}", "--trainer.max_steps=10"]
    more += [f"--trainer.logger.save_dir={tmp_path}"] if logger == "CSVLogger" else []
    _train([*arguments, *more])
    assert _metrics(tmp_path)["fvu"] < 1 and not list(tmp_path.rglob("events*"))


def _panels_at_the_end(folder, metrics, logger, rank_zero=True):
    """Calls the callback as the trainer does at the end of the test, with these metrics."""
    trainer = mock.MagicMock(spec=lightning.Trainer)
    run_folder = RunFolder(folder, lambda path: None, seed=0)
    run_folder._last_metrics = metrics
    trainer.callbacks, trainer.loggers = [PCABaseline(), run_folder], [logger]
    trainer.is_global_zero, trainer.global_step, trainer.max_steps = rank_zero, 7, 7
    trainer.datamodule = SimpleNamespace(
        batch_size=4, hookpoint="resid.0", cache=SimpleNamespace(manifest={"model": None})
    )
    module = SparseAutoencoderModule(lambda d_model: TopK(d_model, 6, 2))
    module.learners[SINGLE] = Learner(TopK(4, 6, 2), module.recipe)
    TensorBoardPanels().on_test_end(trainer, module)


METRICS = {
    "fvu": 0.2, "l0": 2.0, "n_latents": 6, "seed": None, "ce_increase": 0.5, "kl": 0.25,
    "baselines": {
        "pca": {"fvu": 0.4, "l0": 2.0, "n_latents": 4, "fvu_by_components": {"2": 0.4},
                "ce_increase": 1.5, "kl": None},
    },
}  # fmt: skip


def test_what_was_measured_on_the_model_is_drawn_beside_the_scores(tmp_path):
    logger = TensorBoardLogger(str(tmp_path), name="tensorboard", version="")
    _panels_at_the_end(tmp_path, METRICS, logger)
    events = _events(tmp_path / "tensorboard")
    drawn = {tag: events.Scalars(tag)[0] for tag in events.Tags()["scalars"]}
    assert {tag: (e.step, e.value) for tag, e in drawn.items()} == {
        "test/ce_increase": (7, 0.5), "test/kl": (7, 0.25), "baseline/pca/ce_increase": (7, 1.5),
    }  # fmt: skip
    charts = {chart.title: list(chart.multiline.tag) for chart in _layout(events).category[0].chart}
    assert charts["CE increase (nats)"] == ["^(val|test)/ce_increase$", "^baseline/pca/ce_increase$"]
    assert charts["KL (nats)"] == ["^(val|test)/kl$", "^baseline/pca/kl$"]
    # Imported rows have no model, and a run may have no seed: no cell rather than the word None.
    assert not {"model", "seed"} & set(_start_info(events).hparams)


@pytest.mark.parametrize("case", ["another rank", "another logger"])
def test_other_ranks_and_other_loggers_write_nothing(tmp_path, case):
    tensorboard = TensorBoardLogger(str(tmp_path), name="tensorboard", version="")
    logger = CSVLogger(str(tmp_path)) if case == "another logger" else tensorboard
    _panels_at_the_end(tmp_path, METRICS, logger, rank_zero=case != "another rank")
    assert list(tmp_path.rglob("events*")) == []


def test_projector_samples_many_latents_and_says_so(tmp_path):
    directions = F.normalize(torch.randn(5_003, 3), dim=-1)
    names = [[f"name {i}"] for i in range(5_003)]
    for _ in range(2):
        write_projector(tmp_path, directions, names, ["latent"], 1_000)
    config = (tmp_path / "tensorboard" / "projector_config.pbtxt").read_text()
    assert config.count("embeddings") == 1 and '"directions (5,000 of 5,003), step 1,000"' in config
    rows = np.loadtxt(tmp_path / "tensorboard" / "projector" / "tensors.tsv", delimiter="\t")
    shown = (tmp_path / "tensorboard" / "projector" / "metadata.tsv").read_text().splitlines()
    latents = [int(line.removeprefix("name ")) for line in shown]
    assert len(set(latents)) == 5_000 and latents == sorted(latents)
    np.testing.assert_allclose(rows, directions[latents].numpy(), atol=1e-4)
    assert not list((tmp_path / "tensorboard").glob("events*"))


@contextmanager
def _served(folder):
    """A TensorBoard on a free port, ended afterwards; gives a function from an address to what it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--host", "127.0.0.1"]
    process = subprocess.Popen(
        [*command, "--port", str(port), "--reload_interval", "1", "--load_fast", "false"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )

    def ask(address, body=None):
        data = None if body is None else json.dumps(body).encode()
        request = Request(f"http://127.0.0.1:{port}{address}", data, {"Content-Type": "application/json"})
        with urlopen(request, timeout=30) as answer:
            return answer.read()

    try:
        deadline, known = time.monotonic() + 180, b""
        # Runs are listed before all of their files have been read; the last one has the hyperparameters.
        while b"n_latents" not in known and time.monotonic() < deadline:
            time.sleep(0.2)
            with suppress(OSError):
                known = ask("/data/plugin/hparams/experiment", {"experimentName": ""})
        yield ask
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=30)


def test_tensorboard_serves_all_of_it(run):
    with _served(run) as ask:
        answers = {name: json.loads(ask(address)) for name, address in {
            "runs": "/data/runs",
            "scalars": "/data/plugin/scalars/tags",
            "histograms": "/data/plugin/histograms/tags",
            "images": "/data/plugin/images/tags",
            "layout": "/data/plugin/custom_scalars/layout",
            "projector": "/data/plugin/projector/info?run=tensorboard",
        }.items()}  # fmt: skip
        assert answers["runs"] == ["tensorboard"]
        tags = set(answers["scalars"]["tensorboard"])
        assert {"train/fvu", "val/fvu", "test/fvu", "baseline/pca/fvu", "baseline/nmf/fvu"} <= tags
        assert not any("hp_metric" in tag or "at_equal_l0" in tag for tag in tags)
        assert set(answers["histograms"]["tensorboard"]) == {
            "latents/log10_density", "latents/nearest_neighbour_cosine",
        }  # fmt: skip
        assert set(answers["images"]["tensorboard"]) == {f"figures/{name}" for name in FIGURES}

        charts = {c["title"]: c["multiline"]["tag"] for c in answers["layout"]["category"][0]["chart"]}
        measured = ["CE increase (nats)", "KL (nats)"] if _metrics(run).get("ce_increase") is not None else []
        assert list(charts) == [*QUANTITIES, *measured, *OF_CODES]  # the last layout written
        matched = set()
        for pattern in charts["FVU"]:
            found = json.loads(
                ask(f"/data/plugin/custom_scalars/scalars?run=tensorboard&tag={quote(pattern)}")
            )
            matched |= set(found["tag_to_events"])
        assert matched == {"val/fvu", "test/fvu", "baseline/pca/fvu", "baseline/nmf/fvu"}

        (image,) = json.loads(
            ask("/data/plugin/images/images?run=tensorboard&tag=figures/densities&sample=0")
        )
        assert ask(f"/data/plugin/images/individualImage?{image['query']}").startswith(b"\x89PNG")

        (embedding,) = answers["projector"]["embeddings"]
        assert embedding["tensorName"] == "directions, step 20" and embedding["tensorShape"] == [32, 16]
        which = f"run=tensorboard&name={quote(embedding['tensorName'])}"
        points = np.frombuffer(ask(f"/data/plugin/projector/tensor?{which}"), dtype=np.float32).reshape(
            32, 16
        )
        np.testing.assert_allclose(points, sae.load(run).directions.numpy(), atol=1e-4)
        table = [
            line.split("\t") for line in ask(f"/data/plugin/projector/metadata?{which}").decode().splitlines()
        ]
        assert table == [["latent", "fires on"], *([str(i), f"token {i}"] for i in range(32))]
        _check_served_hparams(ask, _metrics(run))


def _check_served_hparams(ask, metrics):
    experiment = json.loads(ask("/data/plugin/hparams/experiment", {"experimentName": ""}))
    names = [info["name"]["tag"] for info in experiment["metricInfos"]]
    wanted = {
        "test/fvu": metrics["fvu"], "test/l0": metrics["l0"], "test/dead_fraction": metrics["dead_fraction"],
        "test/cosine": metrics["cosine"], "test/ce_increase": metrics.get("ce_increase"),
        "baseline/pca/fvu": metrics["baselines"]["pca"]["fvu"],
        "baseline/nmf/fvu": metrics["baselines"]["nmf"]["fvu"],
    }  # fmt: skip
    assert names == list(wanted)
    columns = [{"hparam": info["name"]} for info in experiment["hparamInfos"]]
    columns += [{"metric": info["name"]} for info in experiment["metricInfos"]]
    request = {
        "experimentName": "", "colParams": columns, "startIndex": 0, "sliceSize": 10,
        "allowedStatuses": ["STATUS_UNKNOWN", "STATUS_SUCCESS", "STATUS_FAILURE", "STATUS_RUNNING"],
    }  # fmt: skip
    (row,) = json.loads(ask("/data/plugin/hparams/session_groups", request))["sessionGroups"]
    assert row["hparams"]["kind"] == "TopK" and row["hparams"]["lr"] == 0.002 and row["hparams"]["k"] == 4
    shown = {value["name"]["tag"]: value["value"] for value in row["metricValues"]}
    assert shown == {
        name: pytest.approx(value, rel=1e-5) for name, value in wanted.items() if value is not None
    }
