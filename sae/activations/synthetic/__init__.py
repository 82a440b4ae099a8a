"""Worlds whose features are known: what a dictionary finds in their rows can be held against the truth."""

from sae.activations.synthetic.config import PRESETS, WorldConfig, WorldSource
from sae.activations.synthetic.planted import PlantedRows, PlantedWorld
from sae.activations.synthetic.stream import WorldStream
from sae.activations.synthetic.world import World
from sae.activations.synthetic.written import CachedTruth, cached_truth, is_of_a_world, write_world

__all__ = [
    "PRESETS",
    "CachedTruth",
    "PlantedRows",
    "PlantedWorld",
    "World",
    "WorldConfig",
    "WorldSource",
    "WorldStream",
    "cached_truth",
    "is_of_a_world",
    "write_world",
]
