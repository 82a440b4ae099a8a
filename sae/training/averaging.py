"""Running means of a dictionary's weights, used in their place when it is scored and saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sae.dictionaries import SparseAutoencoder


class WeightAverages(nn.Module):
    """Exponential moving averages of all weights: mean <- decay * mean + (1 - decay) * weight.

    Weights are the parameters, and thresholds that are none (a kind's `exact` tensors).

    Early on the decay is smaller, (1 + steps) / (10 + steps), so that the start is soon forgotten.

    References:
        Scaling and evaluating sparse autoencoders, Gao et al. 2024, arXiv 2406.04093, appendix A.
    """

    steps: Tensor

    def __init__(self, dictionary: SparseAutoencoder, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        for name, weight in _weights(dictionary).items():
            self.register_buffer(name, weight.detach().clone())

    @torch.no_grad()
    def update(self, dictionary: SparseAutoencoder) -> None:
        """Takes the weights of a step."""
        self.steps += 1
        kept = ((1.0 + self.steps) / (10.0 + self.steps)).clamp_max(self.decay)
        for name, weight in _weights(dictionary).items():
            self.get_buffer(name).lerp_(weight, (1.0 - kept).to(weight))

    @contextmanager
    def used_in(self, dictionary: SparseAutoencoder) -> Iterator[None]:
        """The dictionary has the means for weights, unit rows restored; afterwards its own again."""
        own = {name: weight.detach().clone() for name, weight in _weights(dictionary).items()}
        try:
            self.copy_into(dictionary)
            yield
        finally:
            with torch.no_grad():
                for name, weight in _weights(dictionary).items():
                    weight.copy_(own[name])

    @torch.no_grad()
    def copy_into(self, dictionary: SparseAutoencoder) -> None:
        """Gives the dictionary the means for good."""
        for name, weight in _weights(dictionary).items():
            weight.copy_(self.get_buffer(name))
        dictionary.constrain()


def _weights(dictionary: SparseAutoencoder) -> dict[str, Tensor]:
    exact: dict[str, Tensor] = {name: getattr(dictionary, name) for name in dictionary.exact}
    return {**dict(dictionary.named_parameters()), **exact}
