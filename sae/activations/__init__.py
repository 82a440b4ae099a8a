"""Language models in, activation rows out: hookpoints, harvest, cache, sampling."""

from sae.activations.cache import ActivationCache, RowBatch
from sae.activations.datamodule import ActivationDataModule
from sae.activations.harvest import Source, harvest

__all__ = ["ActivationCache", "ActivationDataModule", "RowBatch", "Source", "harvest"]
