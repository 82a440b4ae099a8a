"""Training a dictionary with Lightning: losses, schedules, dead latents, the module."""

from sae.training.module import SparseAutoencoderModule

__all__ = ["SparseAutoencoderModule"]
