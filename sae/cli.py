"""The command line: LightningCLI with names in full, short errors, and a run folder as its output."""

from __future__ import annotations

import argparse
import difflib
import inspect
import logging
import re
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

import lightning
import yaml
from jsonargparse import ActionConfigFile  # pyright: ignore[reportPrivateImportUsage]
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from torch.nn.parallel import DistributedDataParallel

from sae.activations import ActivationDataModule
from sae.activations.ranks import was_restarted
from sae.callbacks import (  # the baselines for their short names
    AgainstTheTruth,
    Agreement,
    Checkpoints,
    CodeScores,
    NMFBaseline,
    PCABaseline,
    ProgressFile,
    RunFolder,
    SplicedLoss,
    TensorBoardPanels,
    Throughput,
    TrainingBar,
)
from sae.callbacks.baselines import check_names
from sae.checkpoints import WholeCheckpoints
from sae.errors import InputError
from sae.files import write_atomically
from sae.launch import check_launch
from sae.studies.l0_run import ChooseL0
from sae.training import SparseAutoencoderModule
from sae.training.names import check_given
from sae.training.trainer_settings import check_trainer, hush_lightning
from sae.trust import TRUST_FLAG, TrustFlag, check_class_paths, only_trusted_classes, refusal, wants_trust

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
LONGEST_ERROR = 400  # characters
_RARE = {
    *(f"model.{name}" for name in ("warmup_steps", "decay_share", "revival", "auxk_coefficient", "start")),
    *(f"model.{name}" for name in ("pre_act_coefficient", "resample_every", "dead_after_tokens", "l0_start")),
    *(f"model.{name}" for name in ("whiten", "ema_decay", "row_sparse_adam")),
    *(f"data.{name}" for name in ("shuffle_rows", "workers", "local_disk")),
}
"""Options that the short help leaves out."""
__all__ = ["NMFBaseline", "PCABaseline", "SaeCLI", "find_config"]


class SaeCLI(LightningCLI):
    """Parses the configuration and builds datamodule, module and trainer; runs nothing."""

    datamodule: ActivationDataModule
    model: SparseAutoencoderModule

    def __init__(self, args: ArgsType = None) -> None:
        hush_lightning()
        super().__init__(
            SparseAutoencoderModule,
            ActivationDataModule,
            save_config_callback=None,  # RunFolder writes it, once training can start
            trainer_defaults={
                "default_root_dir": "runs/default",
                "max_steps": 2000,
                "accelerator": "auto",
                "devices": "auto",
                "gradient_clip_val": 1.0,
                "num_sanity_val_steps": 0,
                "val_check_interval": 500,
                "check_val_every_n_epoch": None,
                "enable_model_summary": False,
            },
            seed_everything_default=0,
            parser_class=_Parser,
            parser_kwargs={"allow_abbrev": False, "logger": _drop_logger()},
            args=args,
            run=False,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """The parser, with configurations found by bare name."""
        parser = self.parser_class(
            description="Trains a sparse dictionary on cached activations, beside PCA and NMF.",
            epilog="Most used, beside --config: --data.source.{model,dataset,hookpoints,n_tokens},"
            " --model.dictionary.init_args.{n_latents,k}, --trainer.{max_steps,default_root_dir}. Lists"
            " are written '[resid.2,resid.3]'. Several dictionaries on one read of the data:"
            " --model.dictionaries, by name. --data.source.help and --model.dictionary.help TopK show"
            " the rest.",
            **kwargs,
        )
        parser.add_argument(
            "-c", "--config", action=_FindConfig, help="YAML file; a bare name is looked up in configs/ too."
        )
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Our own switches."""
        parser.add_argument(
            "--fresh", type=bool, default=False, help="Start over: discard what the run folder has."
        )
        parser.add_argument(
            TRUST_FLAG, action=TrustFlag, help="Import whatever classes the configuration names."
        )
        parser.add_argument(
            "--checkpoint_every",
            type=int,
            default=500,
            help="Steps between checkpoints: what a killed process loses at most.",
        )
        parser.add_argument(
            "--report", type=bool, default=True, help="Read the latents and write the report at the end."
        )
        parser.add_argument(
            "--plan.show",
            type=bool,
            default=False,
            help="--plan: print memory, disk, time and communication; start nothing.",
        )
        parser.add_argument(
            "--plan.gpus", type=int | None, default=None, help="GPUs planned for; null = as the Trainer has."
        )
        parser.add_argument("--plan.memory", type=str, default=None, help="Of one GPU, e.g. 80GB.")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        """Parses `args`, or the command line."""
        assert args is None or isinstance(args, list), "arguments come as on the command line"
        argv = sys.argv[1:] if args is None else args
        # A switch alone reads better than `--fresh=true`.
        switches = {"--fresh": "--fresh=true", "--plan": "--plan.show=true"}
        self._trusted = wants_trust(argv)
        with only_trusted_classes(self._trusted):
            self.config = parser.parse_args([switches.get(argument, argument) for argument in argv])
        check_class_paths(self.config, self._trusted)
        check_given(self.config.model.dictionary, self.config.model.dictionaries)
        if was_restarted():
            self.config.fresh = False  # meant when the command was given, not after each preemption

    def instantiate_classes(self) -> None:
        """Builds datamodule, module and trainer, in that order."""
        with warnings.catch_warnings(), only_trusted_classes(self._trusted):
            # Lightning calls jsonargparse by names that it has since replaced.
            warnings.filterwarnings("ignore", category=DeprecationWarning, module="lightning.*")
            warnings.filterwarnings("ignore", message=r"(?s).*JsonargparseDeprecationWarning")
            try:
                super().instantiate_classes()
            except (MisconfigurationException, ValueError) as error:
                if isinstance(error, InputError):
                    raise
                raise InputError(refusal(str(error)) or _shorten(str(error))) from error

    def instantiate_trainer(self, **kwargs: Any) -> lightning.Trainer:
        """The trainer, with checkpoints, TensorBoard and the run folder whatever the callbacks listed."""
        self.model.check_dictionary()  # before any folder or cache is made
        if not self.config.plan.show:
            check_launch(self.config_init.trainer.num_nodes)
        root = self.run_folder
        config = self.config_init.trainer
        self.agreement = Agreement(self.config_values)
        self.run_files = RunFolder(root, self.save_config, self.config.seed_everything)
        extra: list[lightning.Callback] = [
            ChooseL0(root),
            Throughput(),
            SplicedLoss(),
            CodeScores(),
            AgainstTheTruth(),
            self.run_files,
            TensorBoardPanels(),
            ProgressFile(root),
        ]
        if config.enable_checkpointing is not False:
            extra.append(Checkpoints(root / "checkpoints", self.config.checkpoint_every))
        listed = config.callbacks or []
        listed = listed if isinstance(listed, list) else [listed]
        check_names(listed)
        callbacks = [self.agreement, *listed, *extra]
        if config.enable_progress_bar is not False:
            callbacks.append(TrainingBar())
        self.config_init.trainer.enable_progress_bar = False  # Lightning's own: per pass, on standard output
        self.config_init.trainer.callbacks = None
        if config.logger is None or config.logger is True:
            kwargs["logger"] = TensorBoardLogger(str(root), name="tensorboard", version="")
        plugins = config.plugins or []
        self.config_init.trainer.plugins = None
        plugins = [*(plugins if isinstance(plugins, list) else [plugins]), WholeCheckpoints()]
        trainer = super().instantiate_trainer(callbacks=callbacks, plugins=plugins, **kwargs)
        check_trainer(trainer)
        if isinstance(trainer.strategy, DDPStrategy):
            trainer.strategy._ddp_kwargs = _ddp_defaults() | trainer.strategy._ddp_kwargs
        return trainer

    @property
    def run_folder(self) -> Path:
        """Where the run writes."""
        return Path(self.config.trainer.default_root_dir)

    @property
    def config_values(self) -> dict[str, Any]:
        """The whole configuration as plain values."""
        with only_trusted_classes(self._trusted):
            text = self.parser.dump(self.config, skip_unset=False, skip_link_targets=False)
        values = yaml.safe_load(text)
        for name in ("fresh", "config", "plan", "report"):  # of this call, not of the run
            values.pop(name, None)
        return values

    def save_config(self, path: Path) -> None:
        """Writes the whole configuration, readable by `--config`."""
        write_atomically(path, yaml.safe_dump(self.config_values, sort_keys=False).encode())


class _FindConfig(ActionConfigFile):
    """`--config quickstart.yaml` finds configs/quickstart.yaml."""

    def __call__(self, parser: Any, namespace: Any, value: Any, option_string: str | None = None) -> None:
        super().__call__(parser, namespace, str(find_config(value)), option_string)


def find_config(name: str) -> Path:
    """The file, or the one of that name in configs/.

    Raises:
        InputError: if there is neither; lists what configs/ has.
    """
    for path in (Path(name), CONFIGS / name, CONFIGS / f"{name}.yaml"):
        if path.is_file():
            return path
    there = ", ".join(sorted(path.name for path in CONFIGS.glob("*.yaml"))) or "nothing"
    raise InputError(f"`--config` {name!r} is not a file, and configs/ has no such name (it has {there}).")


class _Parser(LightningArgumentParser):
    """Errors in two lines with status 2, and a help that fits two screens."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.usage = "train.py --config NAME [--group.key VALUE ...]"
        self.add_argument("--help_all", action=_HelpAll, help="Show all options, the Trainer's too.")
        self._show_trainer = False

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Prints the message alone and exits with 2."""
        if isinstance(ex, InputError):
            message = str(ex)
        message = refusal(message) or _shorten(message)
        unknown = re.search(r"unrecognized arguments: --([^\s=]+)", message)
        if unknown:
            options = [option[2:] for option in self._option_string_actions if option.startswith("--")]
            close = difflib.get_close_matches(unknown[1], options, n=1)
            message += f"; did you mean --{close[0]}?" if close else "; see --help and --help_all."
        raise InputError(message)

    def format_help(self) -> str:
        """Without the Trainer's hundred options and those of the recipe, unless asked."""
        if self._show_trainer:
            return super().format_help()
        shown, rare = list(self._action_groups), [a for a in self._actions if a.dest in _RARE]
        helps = [action.help for action in rare]
        self._action_groups = [group for group in shown if not _is_trainer(group)]
        for action in rare:
            action.help = argparse.SUPPRESS
        try:
            return super().format_help()
        finally:
            self._action_groups = shown
            for action, text in zip(rare, helps, strict=True):
                action.help = text

    def show_all_help(self) -> NoReturn:
        """Prints the long help."""
        self._show_trainer = True
        self.print_help()
        self.exit()


class _HelpAll(argparse.Action):
    def __init__(self, option_strings: list[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, default=argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: Any, *args: Any, **kwargs: Any) -> None:
        parser.show_all_help()


def _ddp_defaults() -> dict[str, Any]:
    """Gradients lie in the buckets that are sent, and buffers are equal on all ranks by themselves."""
    names = inspect.signature(DistributedDataParallel).parameters
    sync = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"
    return {"gradient_as_bucket_view": True, sync: False}


def _is_trainer(group: Any) -> bool:
    return any("--trainer." in option for action in group._group_actions for option in action.option_strings)


def _shorten(message: str) -> str:
    """The part of a parser's message that says something, within bounds.

    For `X | None` jsonargparse reports every alternative; the first one's error is the telling one.
    """
    telling = re.search(r"Errors:\s*- (.+?)(?:\n\s*- |\s*Given value|$)", message, re.DOTALL)
    key = re.search(r'Parser key "([^"]+)"', message)
    if telling and key:
        message = f"{key[1]}: {telling[1]}"
    text = " ".join(message.split())
    return text if len(text) <= LONGEST_ERROR else text[: LONGEST_ERROR - 1] + "…"


def _drop_logger() -> logging.Logger:
    """A logger that shows which arguments a changed kind drops; jsonargparse says it at DEBUG only."""
    logger = logging.getLogger("sae.config")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.addFilter(lambda record: "discard" in record.getMessage().lower())
        handler.setFormatter(logging.Formatter("note: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.DEBUG)
        logger.propagate = False
    return logger
