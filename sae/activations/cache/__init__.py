"""The activation cache: its format on disk, writing it, reading it."""

from sae.activations.cache.format import FORMAT, Split, read_manifest
from sae.activations.cache.reader import ActivationCache, RowBatch
from sae.activations.cache.shard import Shard

__all__ = ["FORMAT", "ActivationCache", "RowBatch", "Shard", "Split", "read_manifest"]
