"""What an activation cache is made from: the `data.source` group of a configuration."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from sae.errors import InputError


@dataclass(frozen=True)
class Source:
    """What a cache is made from, by name.

    Names say nothing of contents: the manifest has hashes of the model's weights and of the tokens, and
    latents are read only with the weights that the cache was made with.
    """

    model: str = "demo"
    """`demo`, a folder with a transformers model and its tokenizer, or a Hugging Face id."""
    dataset: str = "demo"
    """`demo`, a .txt / .jsonl / .parquet file or glob, or a Hugging Face id (`id` or `id:config`)."""
    hookpoints: list[str] = field(default_factory=lambda: ["resid.2"])
    """Where to read the residual stream; `resid.L` is after L blocks."""
    n_tokens: int = 400_000
    """Tokens to cache over both splits."""
    context_length: int = 128
    """Tokens per context."""
    held_out: float = 0.05
    """Share of the documents held out for evaluation."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """How rows are stored; auto keeps the model's own dtype."""

    def check(self) -> None:
        """Raises `InputError` for values out of range (not on construction: the parser would hide it)."""
        for name in ("n_tokens", "context_length"):
            if getattr(self, name) < 1:
                raise InputError(f"`{name}` must be at least 1, got {name}={getattr(self, name)}.")
        if not 0 < self.held_out < 1:
            raise InputError(
                f"`held_out` must lie between 0 and 1, got {self.held_out}; scores need documents that"
                " training never saw."
            )
