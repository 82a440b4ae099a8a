"""From directions to tokens: what a latent fires on, what it makes the model say, and what chance gives."""

from sae.inspection.evidence import Evidence, gather_evidence
from sae.inspection.latent import Ablation, Context, InputToken, LatentReading, LatentSummary, OutputToken
from sae.inspection.reading import Reading, TextReading
from sae.inspection.tables import latent_page, latent_table, text_table, token_tables

__all__ = [
    "Ablation",
    "Context",
    "Evidence",
    "InputToken",
    "LatentReading",
    "LatentSummary",
    "OutputToken",
    "Reading",
    "TextReading",
    "gather_evidence",
    "latent_page",
    "latent_table",
    "text_table",
    "token_tables",
]
