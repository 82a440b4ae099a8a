"""From directions to tokens: what a latent fires on and what it makes the model say."""

from sae.inspection.input_tokens import InputToken, InputTokens, LatentSummary
from sae.inspection.output_tokens import OutputToken, output_tokens
from sae.inspection.reading import LatentReading, Reading

__all__ = [
    "InputToken",
    "InputTokens",
    "LatentReading",
    "LatentSummary",
    "OutputToken",
    "Reading",
    "output_tokens",
]
