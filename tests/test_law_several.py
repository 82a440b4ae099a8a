"""The law of several: dictionaries that learn from one read of the data become what they would be alone."""

import json
from functools import partial
from pathlib import Path

import lightning
import pytest
import torch
import yaml
from support.laws import KINDS, differing, left_by, write_run
from support.ranks import run_ranks

import sae
from sae.activations import ActivationDataModule
from sae.activations.exchange.imported import import_rows
from sae.dictionaries import Dictionary, TopK
from sae.errors import DivergedError, InputError
from sae.runs import OUTPUTS, open_run
from sae.status import read_row
from sae.summary import summary
from sae.training import SparseAutoencoderModule
from sae.training.names import SINGLE
from train import main

pytestmark = pytest.mark.shapes_unchecked

SOME = ("TopK", "BatchTopK", "JumpReLU")


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    torch.manual_seed(0)
    rows = torch.randn(3000, 16) @ torch.randn(16, 16)
    return import_rows(rows, tmp_path_factory.mktemp("law") / "cache", held_out=0.1).location


def _write_several(folder, cache, kinds=SOME, **settings):
    """As `write_run`, for several kinds; each has its kind's name in small letters."""
    path = Path(write_run(folder, cache, **settings))
    values = yaml.safe_load(path.read_text())
    del values["model"]["dictionary"]
    values["model"]["dictionaries"] = {
        kind.lower(): {"class_path": kind, "init_args": KINDS[kind]} for kind in kinds
    }
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return str(path)


def _of_one(left, name, place, parameters):
    """What a run of several has left of the dictionary at a place, under the names of a run of its own."""
    inner = ".checkpoint.optimizer_states.0"
    found = {}
    for key, value in left.items():
        if key.startswith(f".checkpoint.state_dict.learners.{name}."):
            key = key.replace(f"learners.{name}.", "learners.dictionary.")
        elif key.startswith(f"{inner}.state."):
            number, _, moment = key.removeprefix(f"{inner}.state.").partition(".")
            if not 0 <= int(number) - parameters[0] < parameters[1]:
                continue
            key = f"{inner}.state.{int(number) - parameters[0]}.{moment}"
        elif key.startswith(f"{inner}.param_groups.{place}.") and ".params." not in key:
            key = key.replace(f"param_groups.{place}", "param_groups.0")
        elif key.startswith(f".metrics.dictionaries.{name}."):
            key = key.replace(f"dictionaries.{name}.", "")
        elif key.startswith(".curves.") and f"/{name}/" in key:
            key = key.replace(f"/{name}/", "/")
        else:
            continue
        found[key] = value
    return found


def _alone(left):
    """What of a run of one dictionary is that dictionary's."""
    kept = (".checkpoint.state_dict.", ".checkpoint.optimizer_states.0.", ".metrics.", ".curves.")
    of_the_run = {"finished", "steps", "tokens_seen", "d_model", "seed"}
    return {
        key: value
        for key, value in left.items()
        if key.startswith(kept)
        and ".params." not in key
        and not (key.startswith(".metrics.") and key.removeprefix(".metrics.") in of_the_run)
        and not (key.startswith(".curves.") and "/" not in key)  # `step`, `epoch`: the run's
    }


def _check_law(cache, folder, kinds, **settings):
    settings["model"] = {"revival": None, "dead_after_tokens": 200}  # each kind's own way, the same for all
    main(["--config", _write_several(folder / "several", cache, kinds, **settings)])
    several = left_by(folder / "several" / "run")
    begin = 0
    for place, kind in enumerate(kinds):
        main(["--config", write_run(folder / kind, cache, kind, **settings)])
        alone = left_by(folder / kind / "run")
        moments = [k for k in alone if k.startswith(".checkpoint.optimizer_states.0.state.")]
        n = len({k.split(".")[5] for k in moments})
        of_one = _of_one(several, kind.lower(), place, (begin, n))
        begin += n
        assert any("exp_avg" in k for k in of_one) and any("dead_latents" in k for k in of_one)
        assert ".metrics.fvu" in of_one and ".metrics.l0" in of_one
        assert differing(_alone(alone), of_one) == [], kind
        weights = [sae.load(folder / a / "run" / b).saved_tensors() for a, b in
                   ((kind, "dictionary"), ("several", f"dictionaries/{kind.lower()}"))]  # fmt: skip
        assert differing(*weights) == []
    return several


def _trained(cache, folder, steps=30, ckpt_path=None, **module):
    """The module after a training by Lightning alone: no run folder, no report."""
    lightning.seed_everything(0, verbose=False)
    module = SparseAutoencoderModule(lr=1e-3, warmup_steps=3, dead_after_tokens=400, **module)
    trainer = lightning.Trainer(
        max_steps=steps, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        gradient_clip_val=1.0, val_check_interval=10, check_val_every_n_epoch=None, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, datamodule=ActivationDataModule(str(cache), batch_size=120))
    return module, trainer


def _maker(kind):
    return partial(Dictionary.kinds[kind], **KINDS[kind])


def test_several_become_what_each_would_be_alone(cache, tmp_path):
    """Weights, Adam's moments, counters and scores, bit for bit; AuxK is at work."""
    makers = {kind.lower(): _maker(kind) for kind in SOME}
    several, trainer = _trained(cache, tmp_path, dictionaries=makers)
    moments = trainer.optimizers[0].state
    for name, make in makers.items():
        alone, own_trainer = _trained(cache, tmp_path, dictionary=make)
        mine, own = several.each[name], alone.learner
        if name == "topk":
            assert "auxk" in own.ways and len(own.dead_latents.ids) > 0
        assert mine.state_dict().keys() == own.state_dict().keys()
        for key, value in own.state_dict().items():
            assert torch.equal(value, mine.state_dict()[key]), (name, key)
        pairs = zip(mine.dictionary.parameters(), own.dictionary.parameters(), strict=True)
        for p, q in pairs:
            for key, value in own_trainer.optimizers[0].state[q].items():
                assert torch.equal(value, moments[p][key]), (name, key)
        assert several.held_out.scores[name] == alone.scores
        assert torch.equal(several.held_out.densities[name], alone.held_out.densities[SINGLE])


def test_the_one_that_diverges_is_named(cache, tmp_path):
    class Breaks(TopK):
        def training_code(self, u, *arguments):
            return super().training_code(u * 1e38 * 1e38, *arguments)

    Dictionary.kinds.pop("Breaks", None)
    makers = {"good": _maker("TopK"), "bad": partial(Breaks, n_latents=96, k=2)}
    with pytest.raises(DivergedError, match="the loss of `bad` or its gradient is not finite at step 1 "):
        _trained(cache, tmp_path, dictionaries=makers)


def test_averages_are_what_is_scored_at_the_end(cache, tmp_path):
    """Of each dictionary its own, in the test as in the validation."""
    module, trainer = _trained(cache, tmp_path, dictionaries={"a": _maker("TopK")}, ema_decay=0.9)
    before = module.held_out.scores
    trainer.test(module, datamodule=trainer.datamodule, verbose=False)
    assert module.held_out.scores == before
    averages, dictionary = module.each["a"].averages, module.dictionaries["a"]
    torch.testing.assert_close(dictionary.b_enc, averages.get_buffer("b_enc"), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({}, "exactly one of `model.dictionary` and `model.dictionaries` .* got neither"),
        ({"dictionary": _maker("TopK"), "dictionaries": {"a": _maker("TopK")}}, "got both"),
        ({"dictionaries": {}}, "must have at least one name"),
        ({"dictionaries": {"a/b": _maker("TopK")}}, "must be of letters, digits, - and _ .* got 'a/b'"),
        ({"dictionaries": {"pop": _maker("TopK")}}, "has 'pop', a name that is taken"),
    ],
)
def test_bad_names_are_errors(given, match):
    with pytest.raises(InputError, match=match):
        SparseAutoencoderModule(**given)


@pytest.mark.slow
def test_a_run_of_several_leaves_all_of_it_for_each(cache, tmp_path, capsys):
    config = _write_several(tmp_path, cache, SOME[:2], max_steps=20, callbacks=["PCABaseline"])
    main(["--config", config, "--report=true"])
    run = tmp_path / "run"
    assert {path.name for path in run.iterdir()} <= set(OUTPUTS)
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["finished"] and metrics["steps"] == 20 and "fvu" not in metrics
    lines = summary(run).splitlines()
    for name in ("topk", "batchtopk"):
        own = metrics["dictionaries"][name]
        assert own["fvu"] > 0 and own["n_latents"] == 96 and "ce_increase" in own
        assert own["baselines"]["pca"]["k"] == max(1, round(own["l0"]))
        assert sae.load(run / "dictionaries" / name).n_latents == 96
        assert (run / "report" / name / "index.html").is_file()
        assert any(line.startswith(name) for line in lines)
        assert open_run(run, dictionary=name).dictionary.n_latents == 96
    assert capsys.readouterr().out.count("\nopen ") == 2
    for asked in (None, "nope"):
        with pytest.raises(InputError, match="`--dictionary` must be one of topk, batchtopk for"):
            open_run(run, dictionary=asked)
    fvus = [metrics["dictionaries"][name]["fvu"] for name in ("topk", "batchtopk")]
    row = read_row(run)
    assert row.held_out["fvu"] == pytest.approx(sum(fvus) / 2, rel=1e-3) and "means over" in row.notes[0]
    config = str(tmp_path / "run.yaml")
    main(["--config", config])
    assert "is finished" in capsys.readouterr().out
    (run / "report" / "topk" / "index.html").write_text("mine")
    with pytest.raises(InputError, match="holds something else"):
        main(["--config", config, "--fresh"])


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"accumulate_grad_batches": 2}, {"precision": "64-true"}])
def test_all_kinds_become_what_each_would_be_alone(cache, tmp_path, changes):
    """Beside baselines, each at its own L0."""
    _check_law(cache, tmp_path, tuple(KINDS), **changes)


@pytest.mark.slow
def test_a_run_of_several_goes_on_where_it_was_cut(cache, tmp_path, monkeypatch):
    main(["--config", _write_several(tmp_path / "unbroken", cache)])
    run = _write_several(tmp_path / "cut", cache)
    real = SparseAutoencoderModule.training_step

    def dies(self, batch, batch_idx):
        if self.global_step == 23:
            raise KeyboardInterrupt
        return real(self, batch, batch_idx)

    with monkeypatch.context() as patch:
        patch.setattr(SparseAutoencoderModule, "training_step", dies)
        with pytest.raises(SystemExit):
            main(["--config", run])
    opened = open_run(tmp_path / "cut" / "run", dictionary="jumprelu")
    assert "checkpoint at step" in opened.unfinished and type(opened.dictionary).__name__ == "JumpReLU"
    main(["--config", run])
    assert differing(left_by(tmp_path / "unbroken" / "run"), left_by(tmp_path / "cut" / "run")) == []


@pytest.mark.slow
def test_two_ranks_leave_what_one_leaves_of_several(cache, tmp_path):
    left = []
    for world in (1, 2):
        run = _write_several(tmp_path / f"{world}", cache, devices=world, precision="64-true")
        outcomes = run_ranks(world, main, ["--config", run])
        assert outcomes == [None] * world, "\n".join(map(str, outcomes))
        found = left_by(tmp_path / f"{world}" / "run")
        left.append({name: value for name, value in found.items() if ".generators." not in name})
    assert differing(*left, 1e-6) == []
