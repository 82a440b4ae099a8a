"""Classical factorisations that keep the dictionary contract: PCA and NMF."""

from sae.baselines.base import Baseline
from sae.baselines.nmf import NMF
from sae.baselines.pca import PCA

__all__ = ["NMF", "PCA", "Baseline"]
