"""Questions that take several trained dictionaries to answer."""
