"""Configurations from others run no code: class paths stay within sae's and Lightning's own kinds.

jsonargparse imports whatever dotted path a value names, and importing a module runs it. While
`only_trusted_classes` is entered, a path is checked by its name before anything is imported, and what it
leads to is checked afterwards, so that `lightning.pytorch.cli.os.system` is refused as well.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any
from unittest.mock import patch

from jsonargparse import (
    _typehints,  # pyright: ignore[reportPrivateImportUsage]
    _util,  # pyright: ignore[reportPrivateImportUsage]
    set_parsing_settings,  # pyright: ignore[reportPrivateImportUsage]
)
from jsonargparse._optionals import _get_config_read_mode

from sae.errors import InputError

TRUST_FLAG = "--trust-class-paths"
PACKAGES = ("sae", "lightning")
"""Where a class may be defined without the flag."""


class ClassPathRefused(ImportError, ValueError):
    """A path that may not be imported.

    It has two bases since jsonargparse takes an `ImportError` of a class path, and a `ValueError` of any
    other value, for a bad value rather than a defect.
    """

    def __init__(self, path: str, why: str) -> None:
        super().__init__(f"the class path {path!r} is refused, it {why};")


def wants_trust(arguments: Sequence[str]) -> bool:
    """Whether the flag is on the command line; a configuration cannot give it."""
    return TRUST_FLAG in arguments


@contextmanager
def only_trusted_classes(trusted: bool) -> Iterator[None]:
    """Guards every import that jsonargparse makes for a value: to parse, instantiate and dump.

    Sub-configurations are read from files alone meanwhile; Lightning lets them come from any URL.

    Args:
        trusted: True lets every class path pass.
    """
    if trusted:
        yield
        return
    modules = [m for name, m in list(sys.modules.items()) if name.partition(".")[0] == "jsonargparse"]
    importing = [m for m in modules if vars(m).get("import_object") is _util.import_object]
    # Were it renamed, nothing would be guarded: better no run at all.
    assert _util in importing and _typehints in importing, "this version of jsonargparse is not known"
    guarded = _guard(_util.import_object)
    remote = "s" in _get_config_read_mode()
    with ExitStack() as stack:
        for module in importing:
            stack.enter_context(patch.object(module, "import_object", guarded))
        stack.enter_context(patch.object(_typehints, "import_module", _refuse_module))
        stack.enter_context(patch.object(_typehints, "is_importable_module_path", _refuse_module))
        set_parsing_settings(config_read_mode_fsspec_enabled=False)
        stack.callback(set_parsing_settings, config_read_mode_fsspec_enabled=remote)
        yield


def _guard(real: Callable[..., Any]) -> Callable[..., Any]:
    def import_object(name: str, check_path: bool = True) -> Any:
        if not check_path:  # the path comes from code, e.g. a type annotation
            return real(name, check_path=False)
        # What is no path of identifiers is refused by jsonargparse itself, without an import.
        if isinstance(name, str) and all(part.isidentifier() for part in name.split(".")):
            _check_name(name)
        found = real(name, check_path=False)  # without jsonargparse's own list of what is dangerous
        _check_object(name, found)
        return found

    return import_object


def _refuse_module(path: str) -> Any:
    raise ClassPathRefused(str(path), "is a whole module")


def _check_name(path: str) -> None:
    if path.partition(".")[0] not in PACKAGES:
        raise ClassPathRefused(path, f"is not in {' or '.join(PACKAGES)}")


def _check_object(path: str, found: Any) -> None:
    """Refuses all but classes of ours and Lightning's kinds.

    Functions are refused too: a class method such as `LightningModule.load_from_checkpoint` unpickles.
    """
    if not inspect.isclass(found):
        raise ClassPathRefused(path, "is not a class")
    package = found.__module__.partition(".")[0]
    if package not in PACKAGES:
        raise ClassPathRefused(path, f"is defined in {found.__module__}, not in {' or '.join(PACKAGES)}")
    if package == "lightning" and not issubclass(found, _lightning_kinds()):
        raise ClassPathRefused(path, "is none of the kinds that Lightning's Trainer takes")


@cache
def _lightning_kinds() -> tuple[type, ...]:
    """What the Trainer's options ask for."""
    from lightning.fabric.accelerators.accelerator import Accelerator
    from lightning.fabric.loggers.logger import Logger
    from lightning.fabric.plugins import CheckpointIO, ClusterEnvironment, Precision
    from lightning.pytorch.callbacks import Callback
    from lightning.pytorch.plugins import LayerSync
    from lightning.pytorch.profilers import Profiler
    from lightning.pytorch.strategies import Strategy

    return (
        Accelerator,
        Logger,
        CheckpointIO,
        ClusterEnvironment,
        Precision,
        Callback,
        LayerSync,
        Profiler,
        Strategy,
    )


def check_class_paths(config: Any, trusted: bool, key: str = "") -> None:
    """Refuses class paths that parsing left as plain values, which could be imported later.

    Where an option takes any value, jsonargparse keeps a class path that it cannot import as it is.

    Args:
        config: what was parsed.
        trusted: True lets every class path pass.
        key: where `config` lies in the whole.

    Raises:
        InputError: names the key and the class path.
    """
    if isinstance(config, argparse.Namespace) and argparse.SUPPRESS in vars(config):
        raise InputError(
            f"the configuration has a key that belongs on the command line alone, such as {TRUST_FLAG[2:]};"
            " remove it from the file."
        )
    if trusted:
        return
    if isinstance(config, (list, tuple)):
        for i, value in enumerate(config):
            check_class_paths(value, trusted, f"{key}[{i}]")
        return
    if isinstance(config, argparse.Namespace):
        config = vars(config)
    if not isinstance(config, dict):
        return
    path = config.get("class_path")
    if isinstance(path, str) and "." in path:
        try:
            _guard(_util.import_object)(path)
        except ClassPathRefused as error:
            raise InputError(_sentence(str(error), key)) from error
        except (ImportError, AttributeError, ValueError):
            pass  # there is no such thing in our packages, so it stays a value
    for name, value in config.items():
        check_class_paths(value, trusted, f"{key}.{name}".lstrip("."))


def refusal(message: str) -> str | None:
    """What to tell the user where a parser's message is about a refused class path; None where it is not."""
    refused = re.search(r"the class path '[\w.]+' is refused, it [^;\n]+;", message)
    if not refused:
        return None
    key = re.search(r'[Kk]ey "([^"]+)"', message) or re.match(r"(?:--)?([\w.\[\]]+): ", message)
    return _sentence(refused[0], key[1] if key else "")


def _sentence(refused: str, key: str) -> str:
    where = f"{key}: " if key else ""
    return (
        f"{where}{refused} a configuration may name only classes of sae and the kinds of Lightning, since"
        f" importing others could run any code. If you trust it, add {TRUST_FLAG}."
    )


class TrustFlag(argparse.Action):
    """Shows the flag in the help and takes it on the command line; it is no key of a configuration."""

    def __init__(self, option_strings: list[str], dest: str, help: str | None = None) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, default=argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: `wants_trust` has looked before the first class path was read."""
