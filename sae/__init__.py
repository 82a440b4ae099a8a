"""Sparse dictionary learning on cached transformer activations, beside PCA and NMF."""

from sae.activations.language_model import load_language_model
from sae.activations.splicing import splice
from sae.baselines import NMF, PCA
from sae.dictionaries import Dictionary, TopK
from sae.dictionaries import load_dictionary as load
from sae.dictionaries import save_dictionary as save
from sae.errors import InputError

__all__ = ["NMF", "PCA", "Dictionary", "InputError", "TopK", "load", "load_language_model", "save", "splice"]
__version__ = "0.1.0"
