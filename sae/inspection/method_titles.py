"""How methods are called where people read them."""

from __future__ import annotations

_CAPITALS = {"pca", "nmf", "ica", "sae", "ksvd"}
_SPELT = {"kmeans": "k-means", "ksvd": "K-SVD", "natural": "natural basis", "random": "random directions"}


def method_title(name: str) -> str:
    """The name of a baseline in metrics.json, spelt for a table.

    >>> method_title("nmf_shift"), method_title("kmeans")
    ('NMF shift', 'k-means')
    """
    if name in _SPELT:
        return _SPELT[name]
    return " ".join(word.upper() if word in _CAPITALS else word for word in name.split("_"))
