"""Language models in, activation rows out: hookpoints, harvest, cache, sampling."""

from sae.activations.cache import ActivationCache, RowBatch
from sae.activations.datamodule import ActivationDataModule
from sae.activations.exchange.imported import import_activations, import_rows
from sae.activations.harvest import harvest
from sae.activations.source import Source

__all__ = [
    "ActivationCache",
    "ActivationDataModule",
    "RowBatch",
    "Source",
    "harvest",
    "import_activations",
    "import_rows",
]
