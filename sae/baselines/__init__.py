"""Classical factorisations that keep the dictionary contract, and what to hold them against."""

from sae.baselines.base import Baseline
from sae.baselines.dictionary_learning import DictionaryLearning
from sae.baselines.ica import ICA
from sae.baselines.kmeans import KMeans
from sae.baselines.natural import NaturalBasis
from sae.baselines.nmf import NMF
from sae.baselines.pca import PCA
from sae.baselines.random_directions import RandomDirections
from sae.baselines.semi_nmf import SemiNMF

__all__ = [
    "ICA",
    "NMF",
    "PCA",
    "Baseline",
    "DictionaryLearning",
    "KMeans",
    "NaturalBasis",
    "RandomDirections",
    "SemiNMF",
]
