"""Dictionaries: the contract, one file per kind, saving and loading."""

from sae.dictionaries.autoencoder import SparseAutoencoder
from sae.dictionaries.base import Dictionary, Output
from sae.dictionaries.batch_topk import BatchTopK
from sae.dictionaries.gated import Gated
from sae.dictionaries.jumprelu import JumpReLU
from sae.dictionaries.matching_pursuit import MatchingPursuit
from sae.dictionaries.matryoshka import MatryoshkaBatchTopK
from sae.dictionaries.refined import Refined
from sae.dictionaries.relu import ReLU
from sae.dictionaries.storage import load_dictionary, save_dictionary
from sae.dictionaries.topk import TopK

__all__ = [
    "BatchTopK",
    "Dictionary",
    "Gated",
    "JumpReLU",
    "MatchingPursuit",
    "MatryoshkaBatchTopK",
    "Output",
    "ReLU",
    "Refined",
    "SparseAutoencoder",
    "TopK",
    "load_dictionary",
    "save_dictionary",
]
