"""Dictionaries: the contract, one file per kind, saving and loading."""

from sae.dictionaries.autoencoder import SparseAutoencoder
from sae.dictionaries.base import Dictionary, Output
from sae.dictionaries.storage import load_dictionary, save_dictionary
from sae.dictionaries.topk import TopK

__all__ = ["Dictionary", "Output", "SparseAutoencoder", "TopK", "load_dictionary", "save_dictionary"]
