"""Activations from elsewhere into a cache, and the rows of a cache out of it."""
