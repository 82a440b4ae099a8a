"""What others made (configurations, checkpoints, models, caches, dictionaries) runs no code here."""

import ast
import json
import os
import pickle
import sys
import types
from pathlib import Path

import jsonargparse
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import Logger

import sae
from sae.activations.cache import ActivationCache
from sae.activations.language_model import load_language_model
from sae.checkpoints import WholeCheckpoints
from sae.cli import SaeCLI
from sae.errors import InputError
from sae.runs import open_run
from sae.trust import TRUST_FLAG, check_class_paths, only_trusted_classes, refusal, wants_trust

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.filterwarnings("ignore:(?s).*Jsonargparse")  # of values kept as they are
EVIL = """
import pathlib
pathlib.Path("RAN").touch()
from lightning.pytorch.callbacks import Callback
class Thing(Callback):
    pass
def build(n: int):
    return n
"""


class Evil:
    """Unpickling one leaves a file."""

    def __reduce__(self):
        return os.system, ("touch RAN",)


@pytest.fixture(autouse=True)
def no_code_runs(tmp_path, monkeypatch):
    """A working directory with a module that tells when it is imported; checked after each test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "evil_module.py").write_text(EVIL)
    yield
    sys.modules.pop("evil_module", None)
    assert not (tmp_path / "RAN").exists()


@pytest.fixture
def expect_code(tmp_path):
    """For the tests that must see the code run: `no_code_runs` finds nothing afterwards."""
    yield
    (tmp_path / "RAN").unlink()


# ------------------------------------------------------------------ the hook on a small parser


class Holder:
    """Options of the kinds that can name a class."""

    def __init__(
        self,
        callback: Callback | None = None,
        callbacks: list[Callback] | Callback | None = None,
        logger: Logger | bool | None = None,
        call: types.FunctionType | None = None,
        anything: object = None,
        kind: type | None = None,
        module: types.ModuleType | None = None,
    ) -> None:
        self.callback, self.callbacks, self.logger = callback, callbacks, logger
        self.call, self.anything, self.kind, self.module = call, anything, kind, module


def _parse(arguments, trusted=False):
    parser = LightningArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action=jsonargparse.ActionConfigFile)
    parser.add_class_arguments(Holder, "held")
    with only_trusted_classes(trusted):
        config = parser.parse_args(arguments)
        check_class_paths(config, trusted)
        return parser.instantiate(config).held


REFUSED = {
    "a string": "--held.callback=evil_module.Thing",
    "a class_path": "--held.callback={class_path: evil_module.Thing}",
    "in a list": "--held.callbacks=[{class_path: evil_module.Thing}]",
    "appended": "--held.callbacks+=evil_module.Thing",
    "in a union": "--held.logger={class_path: evil_module.Thing}",
    "a function": "--held.call=evil_module.build",
    "a function of a module that is there": "--held.call=os.system",
    "a type": "--held.kind=evil_module.Thing",
    "a builtin": "--held.kind=builtins.int",
    "a module": "--held.module=evil_module",
    "for any value": "--held.anything={class_path: evil_module.Thing}",
    "deep in any value": "--held.anything={a: [{b: {class_path: evil_module.Thing}}]}",
    "the help": "--held.callback.help=evil_module.Thing",
    "through lightning": "--held.callback=lightning.pytorch.cli.os.system",
    "through sae": "--held.callback=sae.exits.os.system",
    "a class through sae": "--held.callback=sae.files.Path",
    "a class of Lightning that is no kind": "--held.kind=lightning.pytorch.LightningModule",
    "a function of Lightning": "--held.call=lightning.pytorch.seed_everything",
    "what unpickles": "--held.anything={class_path: lightning.pytorch.LightningModule.load_from_checkpoint,"
    " init_args: {checkpoint_path: x.ckpt}}",
    "a name that begins alike": "--held.callback=sae_evil.Thing",
    "within a good one": "--held.callback={class_path: lightning.pytorch.callbacks.LambdaCallback,"
    " init_args: {on_fit_start: evil_module.build}}",
}


@pytest.mark.parametrize("argument", REFUSED.values(), ids=REFUSED)
def test_untrusted_class_paths_are_refused_before_their_import(argument):
    with pytest.raises(Exception, match="class path '[a-z]") as caught:
        _parse([argument])
    message = refusal(str(caught.value))
    assert (
        refusal(message) == message
        and "is refused, it " in message
        and message.endswith(f"If you trust it, add {TRUST_FLAG}.")
    )
    assert len(message) < 400 and "\n" not in message and "held." in message
    assert "evil_module" not in sys.modules


GOOD = {
    "by its path": "--held.callback={class_path: lightning.pytorch.callbacks.EarlyStopping,"
    " init_args: {monitor: fvu}}",
    "by its name": "--held.callback={class_path: PCABaseline, init_args: {curve: [2]}}",
    "ours by its path": "--held.callback=sae.callbacks.Throughput",
    "a logger": "--held.logger={class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: x}}",
    "any plain value": "--held.anything={a: [1, b.c], class: os.system}",
}


@pytest.mark.parametrize("argument", GOOD.values(), ids=GOOD)
def test_kinds_of_ours_and_of_lightning_pass(argument):
    held = _parse([argument])
    assert any(value is not None for value in vars(held).values())


def test_the_flag_lets_every_class_pass(expect_code):
    assert type(_parse(["--held.callback=evil_module.Thing"], trusted=True).callback).__name__ == "Thing"


def test_the_guard_ends_with_its_context_and_comes_back(expect_code):
    before = jsonargparse._util.import_object, jsonargparse._typehints.import_object
    with pytest.raises(ZeroDivisionError), only_trusted_classes(False):
        raise ZeroDivisionError
    with only_trusted_classes(False), only_trusted_classes(False):
        assert jsonargparse._typehints.import_object is not before[1]
    assert before == (jsonargparse._util.import_object, jsonargparse._typehints.import_object)
    assert jsonargparse._util.import_object("evil_module.Thing").__name__ == "Thing"


def test_an_unknown_jsonargparse_is_not_trusted_to_be_guarded(monkeypatch):
    monkeypatch.setattr(jsonargparse._typehints, "import_object", lambda name: None)
    with pytest.raises(AssertionError, match="not known"), only_trusted_classes(False):
        pass


def test_sub_configurations_come_from_files_alone(tmp_path):
    import fsspec

    with fsspec.open("memory://held.yaml", "w") as file:
        file.write("anything: 3\n")
    (tmp_path / "held.yaml").write_text("anything: 3\n")
    assert _parse(["--held=held.yaml"]).anything == 3
    assert _parse(["--held=memory://held.yaml"], trusted=True).anything == 3
    with pytest.raises(jsonargparse.ArgumentError, match="memory://held.yaml"):
        _parse(["--held=memory://held.yaml"])


@pytest.mark.parametrize(
    "tag", ["!!python/object/apply:os.system [touch RAN]", "!!python/name:evil_module.Thing"]
)
def test_yaml_tags_make_no_objects(tmp_path, tag):
    (tmp_path / "c.yaml").write_text(f"held:\n  anything: {tag}\n")
    with pytest.raises(jsonargparse.ArgumentError, match="could not determine a constructor"):
        _parse(["--config=c.yaml"])


def test_other_messages_are_no_refusals():
    assert refusal("Problem with given class_path 'os.system'") is None and not wants_trust(["--x=1"])


# ------------------------------------------------------------------ through SaeCLI, once it is wired


def _cli(config, changes, *arguments):
    values = yaml.safe_load(config.read_text())
    for key, value in changes.items():
        *groups, last = key.split(".")
        within = values
        for group in groups:
            within = within[group]
        within[last] = value
    config.write_text(yaml.safe_dump(values))
    cli = SaeCLI(["--config", str(config), *arguments])
    return cli, cli.config_values


THING = {"class_path": "evil_module.Thing"}
WIRED = {
    "model.dictionary": ["os.system", "evil_module.Thing", THING, THING | {"init_args": {"k": 1}}],
    "model.dictionaries": [{"a": "os.system"}, {"a": THING}, {"a": THING | {"init_args": {"k": 1}}}],
    "trainer.callbacks": [[THING], ["evil_module.Thing"], THING],
    "trainer.logger": [THING, [THING], "evil_module.Thing"],
    "trainer.strategy": [THING],
    "trainer.plugins": [[THING], "evil_module.Thing"],
    "trainer.profiler": [THING],
    "trainer.accelerator": [THING],
    "data.source": [THING, "evil_module.Thing"],
}


@pytest.mark.parametrize(
    ("key", "value"), [(key, value) for key, values in WIRED.items() for value in values], ids=str
)
def test_wired_no_option_of_the_command_imports_others_code(tmp_path, write_config, key, value):
    with pytest.raises(InputError, match=rf"^{key}: the class path '\S+' is refused, .*add {TRUST_FLAG}\.$"):
        _cli(write_config(tmp_path), {key: value})
    assert "evil_module" not in sys.modules


def test_wired_class_paths_kept_as_values_are_refused(tmp_path, write_config):
    logger = {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": "x"}}
    with pytest.raises(
        InputError, match=r"^trainer.logger.dict_kwargs.a: the class path 'evil_module.Thing'"
    ):
        _cli(write_config(tmp_path), {"trainer.logger": logger | {"dict_kwargs": {"a": THING}}})


def test_wired_no_configuration_can_give_the_flag_itself(tmp_path, write_config):
    for key in ("trust_class_paths", "trust-class-paths"):
        with pytest.raises(InputError, match=f"Option '{key}' is not accepted|alone, such as {key}; remove"):
            _cli(write_config(tmp_path), {key: True})
        with pytest.raises(InputError, match="the class path 'evil_module.Thing' is refused"):
            _cli(write_config(tmp_path), {key: True, "trainer.callbacks": [THING]})


def test_wired_the_flag_trusts(tmp_path, write_config, expect_code):
    cli, values = _cli(write_config(tmp_path), {"trainer.callbacks": [THING]}, TRUST_FLAG)
    assert "Thing" in [type(c).__name__ for c in cli.trainer.callbacks]
    assert "trust" not in "".join(values)


def test_wired_the_flag_is_in_the_help(capsys):
    with pytest.raises(SystemExit):
        SaeCLI(["--help"])
    assert TRUST_FLAG in capsys.readouterr().out


# ------------------------------------------------------------------ files of others


@pytest.fixture
def unfinished(tmp_path, write_config):
    """A run folder that stopped at its checkpoint, as `last.ckpt` would lie there."""
    cli = SaeCLI(["--config", str(write_config(tmp_path))])
    (cli.run_folder / "checkpoints").mkdir(parents=True)
    cli.save_config(cli.run_folder / "config.yaml")
    return cli.run_folder


MALICIOUS = {
    "zip": lambda path: torch.save({"state_dict": Evil()}, path),
    "bare pickle": lambda path: path.write_bytes(pickle.dumps({"state_dict": Evil()})),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("write", MALICIOUS.values(), ids=MALICIOUS)
def test_a_malicious_checkpoint_runs_no_code(tmp_path, unfinished, write):
    write(unfinished / "checkpoints" / "last.ckpt")
    sys.path.insert(0, str(ROOT))
    from train import main

    for command in (lambda: open_run(unfinished), lambda: main(["--config", str(tmp_path / "tiny.yaml")])):
        with pytest.raises(InputError):
            command()
        assert not (tmp_path / "RAN").exists()


@pytest.mark.parametrize("file", sorted(ROOT.glob("sae/**/*.py")) + sorted(ROOT.glob("*.py")) + sorted(ROOT.glob("scripts/*.py")), ids=lambda p: p.name)  # fmt: skip  # noqa: E501
def test_nothing_that_unpickles_is_called(file):
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        given = {k.arg: ast.unparse(k.value) for k in node.keywords}
        if called == "torch.load":
            assert given.get("weights_only") == "True", ast.unparse(node)
        if called.endswith((".fit", ".test", ".validate")) and "ckpt_path" in given:
            assert given.get("weights_only") == "True", ast.unparse(node)
        if called in ("np.load", "numpy.load"):
            assert given.get("allow_pickle", "False") == "False", ast.unparse(node)
        assert called not in ("pickle.load", "pickle.loads", "yaml.load", "yaml.unsafe_load", "eval", "exec")
        assert "True" not in given.get("trust_remote_code", ""), ast.unparse(node)


def test_a_model_with_its_own_code_is_refused_without_asking(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr("builtins.input", lambda *args: asked.append(args) or "n")
    code = f"{EVIL}\nfrom transformers import PretrainedConfig\nclass C(PretrainedConfig):\n    pass\n"
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "own.py").write_text(code)
    config = {"model_type": "own-kind", "auto_map": {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M"}}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError):
        load_language_model(str(tmp_path / "model"))
    assert asked == []


@pytest.mark.parametrize("kind", ["os.system", "evil_module.Thing", "__class__", "Dictionary"])
def test_the_kind_of_a_dictionary_is_looked_up_not_imported(tmp_path, kind):
    described = {"format": "sae-dictionary/1", "kind": kind, "d_model": 4, "n_latents": 8, "dtype": "float32"}
    (tmp_path / "config.json").write_text(json.dumps(described))
    with pytest.raises(InputError, match=f"dictionary of kind '{kind}', this version knows"):
        sae.load(tmp_path)


@pytest.mark.parametrize("name", ["../out.safetensors", "/etc/hostname", "a/b.safetensors", "."])
@pytest.mark.parametrize("group", ["shards", "files"])
def test_a_manifest_names_no_file_outside_its_folder(tmp_path, tiny_cache, group, name):
    manifest = json.loads((Path(tiny_cache.location) / "manifest.json").read_text())
    manifest[group][0]["file"] = name
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(InputError, match=r"names the file '.*all files lie in the cache's own folder"):
        ActivationCache(tmp_path)


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("model", "dictionary", "class_path"), "os.system"),
        (("model", "dictionary", "init_args"), {"kk": 4}),
        (("model", "dictionary"), None),
        (("data", "source"), {"n_token": 4}),
    ],
)
def test_the_configuration_of_a_run_that_was_tampered_with_is_refused(unfinished, keys, value):
    parts = ("state_dict", "loops", "dictionary", "generators", "pytorch-lightning_version")
    WholeCheckpoints().save_checkpoint(dict.fromkeys(parts), unfinished / "checkpoints" / "last.ckpt")
    path = unfinished / "config.yaml"
    config = yaml.safe_load(path.read_text())
    inner = config
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(yaml.safe_dump(config))
    with pytest.raises(InputError, match=f"`{'.'.join(keys[:2])}` is not what a run"):
        open_run(unfinished)
