"""Sparse dictionary learning on cached transformer activations, beside PCA and NMF."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sae.activations.language_model import load_language_model
    from sae.activations.splicing import splice
    from sae.baselines import NMF, PCA
    from sae.dictionaries import (
        BatchTopK,
        Dictionary,
        Gated,
        JumpReLU,
        MatchingPursuit,
        MatryoshkaBatchTopK,
        Refined,
        ReLU,
        TopK,
    )
    from sae.dictionaries import load_dictionary as load
    from sae.dictionaries import save_dictionary as save
    from sae.errors import InputError

__all__ = [
    "NMF",
    "PCA",
    "BatchTopK",
    "Dictionary",
    "Gated",
    "InputError",
    "JumpReLU",
    "MatchingPursuit",
    "MatryoshkaBatchTopK",
    "ReLU",
    "Refined",
    "TopK",
    "load",
    "load_language_model",
    "save",
    "splice",
]
__version__ = "0.1.0"

# Imported when first asked for: torch and transformers take seconds, and `scripts/status.py` needs neither.
_HOMES = {
    "NMF": ("sae.baselines", "NMF"),
    "PCA": ("sae.baselines", "PCA"),
    "BatchTopK": ("sae.dictionaries", "BatchTopK"),
    "Dictionary": ("sae.dictionaries", "Dictionary"),
    "Gated": ("sae.dictionaries", "Gated"),
    "JumpReLU": ("sae.dictionaries", "JumpReLU"),
    "MatchingPursuit": ("sae.dictionaries", "MatchingPursuit"),
    "MatryoshkaBatchTopK": ("sae.dictionaries", "MatryoshkaBatchTopK"),
    "ReLU": ("sae.dictionaries", "ReLU"),
    "Refined": ("sae.dictionaries", "Refined"),
    "InputError": ("sae.errors", "InputError"),
    "TopK": ("sae.dictionaries", "TopK"),
    "load": ("sae.dictionaries", "load_dictionary"),
    "load_language_model": ("sae.activations.language_model", "load_language_model"),
    "save": ("sae.dictionaries", "save_dictionary"),
    "splice": ("sae.activations.splicing", "splice"),
}
_ROOMS = ("activations", "baselines", "dictionaries", "errors")


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        module, attribute = _HOMES[name]
        if name == "load":
            import_module("sae.baselines")  # what is loaded may be one
        globals()[name] = found = getattr(import_module(module), attribute)
        return found
    if name in _ROOMS:
        return import_module(f"sae.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
