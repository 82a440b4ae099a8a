"""The configurations for real models: each runs on a tiny model of its family, and says true numbers."""

import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
import transformers
import yaml

import sae
from sae.activations.language_model import load_language_model
from sae.cli import SaeCLI
from sae.errors import InputError

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from train import main  # noqa: E402

pytestmark = pytest.mark.shapes_unchecked

HARVEST = sys.modules["sae.activations.harvest_begun"]
ENDS = {"bos_token_id": 256, "eos_token_id": 256}


def _gpt2(n_layer):
    config = transformers.GPT2Config(
        vocab_size=257, n_positions=64, n_embd=16, n_layer=n_layer, n_head=2, **ENDS
    )
    return transformers.GPT2LMHeadModel(config)


def _gpt_neox():
    config = transformers.GPTNeoXConfig(
        vocab_size=257, hidden_size=16, num_hidden_layers=6, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, **ENDS,
    )  # fmt: skip
    return transformers.GPTNeoXForCausalLM(config).half()


def _gemma2():
    config = transformers.Gemma2Config(
        vocab_size=257, hidden_size=16, num_hidden_layers=14, num_attention_heads=2, num_key_value_heads=1,
        head_dim=8, intermediate_size=32, max_position_embeddings=64, sliding_window=16, pad_token_id=0,
        **ENDS,
    )  # fmt: skip
    return transformers.Gemma2ForCausalLM(config).bfloat16()


# Of every configuration: the width and number of blocks of the real model, and a tiny one of its family.
REAL = {
    "layer12": (1600, 48, lambda: _gpt2(13)),
    "gpt2-small": (768, 12, lambda: _gpt2(12)),
    "pythia-70m": (512, 6, _gpt_neox),
    "gemma-2-2b": (2304, 26, _gemma2),
}
# Told apart from those by a model that comes with the package, or none.
BUILT_IN = {
    path.stem
    for path in (ROOT / "configs").glob("*.yaml")
    if (yaml.safe_load(path.read_text())["data"].get("source") or {}).get("model", "demo") == "demo"
}


@pytest.fixture(params=REAL)
def name(request):
    return request.param


def _text(name):
    return (ROOT / "configs" / f"{name}.yaml").read_text()


def _values(name):
    return yaml.safe_load(_text(name))


def _number(text):
    return float(text.replace(",", ""))


def _stated(pattern, name):
    """The numbers of the one comment that has this form."""
    found = re.findall(pattern, _text(name))
    assert len(found) == 1, f"{name}: {pattern}"
    return [_number(group) for group in found[0]]


@pytest.fixture
def tiny(name, tmp_path, byte_tokenizer):
    """Folder of a random model of the configuration's family."""
    folder = tmp_path / "model"
    REAL[name][2]().save_pretrained(folder)
    byte_tokenizer.save_pretrained(folder)
    return folder


def test_every_configuration_of_a_real_model_is_tested_here():
    assert {path.stem for path in (ROOT / "configs").glob("*.yaml")} - BUILT_IN == set(REAL)


@pytest.mark.slow
def test_runs_end_to_end_on_a_tiny_model_of_its_family(name, tiny, text_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # caches/ and runs/ as the configuration names them
    values = _values(name)
    callbacks = [c if isinstance(c, dict) else {"class_path": c} for c in values["trainer"]["callbacks"]]
    small = {
        "PCABaseline": {"curve": [2]},
        "NMFBaseline": {"n_components": 8, "curve": [4], "max_rows": 500},
    }
    for callback in callbacks:
        callback["init_args"] = callback.get("init_args", {}) | small[callback["class_path"]]
    main([
        f"--config={ROOT / 'configs' / name}.yaml",
        f"--data.source.model={tiny}", f"--data.source.dataset={text_file}",
        "--data.source.n_tokens=6000", "--data.source.context_length=32", "--data.source.held_out=0.1",
        "--data.batch_size=64",
        "--model.dictionary.init_args.n_latents=32", "--model.dictionary.init_args.k=4",
        "--trainer.max_steps=20", "--trainer.val_check_interval=10", "--trainer.log_every_n_steps=10",
        "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
        f"--trainer.callbacks={json.dumps(callbacks)}",
    ])  # fmt: skip
    run = tmp_path / values["trainer"]["default_root_dir"]
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["finished"] and metrics["tokens_seen"] == 20 * 64
    assert math.isfinite(metrics["fvu"]) and set(metrics["baselines"]) == {"pca", "nmf"}
    assert all(math.isfinite(row["fvu"]) for row in metrics["baselines"].values())
    saved = json.loads((run / "dictionary" / "config.json").read_text())
    assert [saved["hookpoint"]] == values["data"]["source"]["hookpoints"]
    assert saved["kind"] == values["model"]["dictionary"]["class_path"]
    dictionary = sae.load(run)
    assert (dictionary.d_model, dictionary.n_latents) == (16, 32)
    (manifest,) = (tmp_path / "caches").glob("*/manifest.json")
    assert json.loads(manifest.read_text())["dtype"] == values["data"]["source"]["dtype"]


def test_width_in_the_comment_is_that_of_the_model_and_the_dictionary(name):
    factor, d_model, n_latents = _stated(r"([\d.]+) x ([\d,]+) = ([\d,]+) latents", name)
    assert d_model == REAL[name][0]
    assert n_latents == _values(name)["model"]["dictionary"]["init_args"]["n_latents"]
    assert n_latents / d_model == pytest.approx(factor, abs=0.005)


def test_disk_in_the_comment_is_what_the_harvest_will_take(name):
    tokens, d_model, size, gigabytes = _stated(r"([\d,]+) tokens x ([\d,]+) x (\d) bytes = ([\d.]+) GB", name)
    source = _values(name)["data"]["source"]
    assert tokens == source["n_tokens"] and d_model == REAL[name][0]
    assert size == getattr(torch, source["dtype"]).itemsize
    assert gigabytes == float(f"{tokens * d_model * size / 1e9:.3g}")


def test_tokens_trained_on_in_the_comment_are_steps_times_batch(name):
    steps, batch, millions, passes, train = _stated(
        r"([\d,]+) x ([\d,]+) = ([\d.]+)M tokens, ([\d.]+) passes over the ([\d.]+)M", name
    )
    values = _values(name)
    source, trainer = values["data"]["source"], values["trainer"]
    assert steps == trainer["max_steps"] and batch == values["data"]["batch_size"]
    assert steps * batch == pytest.approx(millions * 1e6, abs=0.05e6)
    rows = source["n_tokens"] * (1 - source["held_out"])
    assert rows == pytest.approx(train * 1e6, abs=0.05e6)
    assert steps * batch / rows == pytest.approx(passes, abs=0.05)
    assert 3 <= steps / trainer["val_check_interval"] <= 6


def test_hookpoints_exist_and_contexts_fit_the_real_model(name):
    source = _values(name)["data"]["source"]
    (hookpoint,) = source["hookpoints"]
    assert int(hookpoint.removeprefix("resid.")) <= REAL[name][1]
    assert source["context_length"] <= 1024  # GPT-2's longest; the others take more


def test_comment_opens_with_what_it_is_and_says_how_to_go_without_network(name):
    text = _text(name)
    comment = text[: text.index("seed_everything")]
    assert all(line.startswith("#") for line in comment.splitlines())
    assert comment.splitlines()[1] == "#" and "not run yet" in comment
    assert "--data.source.model FOLDER" in comment and "--data.source.dataset 'texts/*.jsonl'" in comment


def test_learning_rate_of_pythia_is_that_of_the_published_run():
    values = _values("pythia-70m")
    n_latents = values["model"]["dictionary"]["init_args"]["n_latents"]
    assert values["model"]["lr"] == 2e-4 * (2**14 / n_latents) ** 0.5
    planned = values["trainer"]["max_steps"] * values["data"]["batch_size"]
    assert planned == 1220 * 8192 < values["model"]["dead_after_tokens"]  # AuxK never starts


@pytest.mark.parametrize("local_model", [False, True], ids=["nothing_local", "model_local"])
def test_offline_it_says_what_to_give_and_leaves_nothing(
    name, tiny, local_model, tmp_path, monkeypatch, capsys
):
    """conftest.py forbids the hub (HF_HUB_OFFLINE) for all tests."""
    from sae.exits import exit_on_input_error

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    loads = []
    monkeypatch.setattr(HARVEST, "load_language_model", lambda *a: loads.append(a) or load_language_model(*a))
    arguments = ["--config", f"{ROOT / 'configs' / name}.yaml"]
    if local_model:
        arguments += [f"--data.source.model={tiny}", "--data.source.context_length=32"]
    with pytest.raises(SystemExit) as stop:
        exit_on_input_error(lambda: main(arguments))
    printed = capsys.readouterr().err.strip()
    source = _values(name)["data"]["source"]
    missing = "dataset" if local_model else "model"
    assert stop.value.code == 2
    assert printed.startswith(f"error: `{missing}` {source[missing]!r} could not be ")
    assert f"--data.source.{missing} " in printed and "HF_HUB_OFFLINE" in printed
    assert len(printed.splitlines()) == 1 and len(printed) <= 400
    assert list((tmp_path / "here").iterdir()) == []
    if local_model:
        assert loads == []  # the text is missed before any weights are loaded


def test_a_text_that_is_missing_is_found_before_the_model_is_loaded(tiny_source, tmp_path, monkeypatch):
    from dataclasses import replace

    from sae.activations import harvest

    monkeypatch.setattr(HARVEST, "load_language_model", lambda *a: pytest.fail("loaded"))
    (tmp_path / "broken.jsonl").write_text("not json\n")
    with pytest.raises(InputError, match="line 1 of .*broken.jsonl"):
        harvest(replace(tiny_source, dataset=str(tmp_path / "*.jsonl")), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_all_are_found_by_bare_name():
    for name in REAL:
        assert SaeCLI(["--config", name]).trainer.max_steps == _values(name)["trainer"]["max_steps"]


def test_the_synthetic_world_runs_end_to_end(tmp_path, monkeypatch):
    from sae.activations.synthetic import cached_truth

    monkeypatch.chdir(tmp_path)
    main([
        f"--config={ROOT / 'configs' / 'synthetic.yaml'}",
        "--data.world.name=tiny", "--data.world.n_rows=6000",
        "--data.batch_size=64", "--model.dictionary.init_args.n_latents=32",
        "--model.dictionary.init_args.target_l0=3", "--trainer.max_steps=20",
        "--trainer.val_check_interval=10",
        "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false",
    ])  # fmt: skip
    values = _values("synthetic")
    metrics = json.loads((tmp_path / values["trainer"]["default_root_dir"] / "metrics.json").read_text())
    assert metrics["finished"] and metrics["tokens_seen"] == 20 * 64 and metrics["ce_clean"] is None
    assert 0 < metrics["truth"]["f1"] < 1 and "truth" in metrics["baselines"]["pca"]
    assert sae.load(tmp_path / values["trainer"]["default_root_dir"]).d_model == 64
    assert cached_truth(tmp_path / values["data"]["cache"]).n_rows == 6000


def test_the_synthetic_comment_says_what_the_world_is():
    from sae.activations.synthetic import World, WorldSource

    values, text = _values("synthetic"), _text("synthetic")
    world = World(WorldSource(**values["data"]["world"]).config())
    init = values["model"]["dictionary"]["init_args"]
    assert init == {"n_latents": world.config.n_features, "target_l0": round(world.mean_l0)}
    assert (
        f"{world.config.n_features:,} in {world.config.d_model} dimensions, {init['target_l0']} of them"
        in text
    )
