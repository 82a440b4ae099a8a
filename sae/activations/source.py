"""What an activation cache is made from: the `data.source` group of a configuration."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from decimal import Decimal
from typing import Any, Literal

from sae.errors import InputError

_SIZE = re.compile(r"(\d[\d_]*(?:\.\d+)?)[\s_]*(?:([kmgtp])(i?))?b?", re.IGNORECASE)


@dataclass(frozen=True)
class Source:
    """What a cache is made from, by name.

    Names say nothing of contents: the manifest has hashes of the model's weights and of the tokens, and
    latents are read only with the weights that the cache was made with.
    """

    model: str = "demo"
    """`demo`, a folder with a transformers model and its tokenizer, or a Hugging Face id."""
    dataset: str = "demo"
    """`demo`, a .txt / .jsonl / .parquet / .npy / .safetensors file or glob, or a Hugging Face id
    (`id` or `id:config`)."""
    hookpoints: list[str] = field(default_factory=lambda: ["resid.2"])
    """Where to read the residual stream; `resid.L` is after L blocks."""
    n_tokens: int = 400_000
    """Tokens to cache over both splits."""
    context_length: int = 128
    """Tokens per context."""
    held_out: float = 0.05
    """Share of the documents held out for evaluation."""
    dtype: Literal["auto", "float32", "bfloat16", "float16", "int8"] = "auto"
    """How rows are stored; auto keeps the model's own dtype."""
    bos_in_every_context: bool = False
    """Every context begins with the separator token (begin-of-sequence), as Gemma and others were trained;
    a context that begins with it anyway gets no second one."""
    exclude_first_position: bool = False
    """Rows of position 0 of each context are not cached (GPT-2's are outliers a hundred times longer)."""
    exclude_special_tokens: bool = False
    """Rows at the tokenizer's special tokens, separators among them, are not cached."""
    non_finite: Literal["error", "skip"] = "error"
    """What to do with NaN or infinite rows: end the harvest, or leave them out and count them."""
    random_weights: int | None = None
    """Seed of random weights in place of the trained ones: the control of a model that learned nothing."""
    disk: str | int | None = None
    """Bytes that the cache may take, e.g. 50GB; then shards are harvested ahead of training and removed
    behind it. null = the whole cache is kept."""

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
        if self.random_weights is not None and not 0 <= self.random_weights < 2**63:
            raise InputError(
                f"`random_weights` must be a seed of at least 0, got {self.random_weights} (below 2^63); null"
                " takes the trained weights."
            )
        check_context_has_rows(self.context_length, self.bos_in_every_context, self.exclude_first_position)
        self.disk_bytes()

    @property
    def model_name(self) -> str:
        """What a cache and all that is made from it say of the model: no other weights go by its name."""
        if self.random_weights is None:
            return self.model
        return f"{self.model} with random weights of seed {self.random_weights}"

    def disk_bytes(self) -> int | None:
        """`disk` in bytes; None = no limit.

        Raises:
            InputError: if it is no size.
        """
        # An unquoted 50_000_000 is an int in YAML.
        return None if self.disk is None else parse_bytes(str(self.disk), "disk")

    def identity(self) -> dict[str, Any]:
        """All that the contents of a cache depend on: equal identities make byte-equal shards.

        Shards that are finished had no rows that are not finite, so they stay good when `non_finite` is
        changed as the error advises. A model with its own weights has the identity that it had before there
        were random ones.
        """
        left_out = {"disk", "non_finite"} | ({"random_weights"} if self.random_weights is None else set())
        return {name: value for name, value in asdict(self).items() if name not in left_out}


def check_context_has_rows(
    context_length: int, bos_in_every_context: bool, exclude_first_position: bool
) -> None:
    """Raises `InputError` where contexts of one token would hold no token of the text, or no row."""
    given = {
        "bos_in_every_context": bos_in_every_context,
        "exclude_first_position": exclude_first_position,
    }
    for name, is_given in given.items():
        if is_given and context_length < 2:
            raise InputError(
                f"`{name}` needs a `context_length` of at least 2, got {context_length}; nothing would be"
                " left of a context."
            )


def parse_bytes(text: str, name: str) -> int:
    """Bytes of a size such as 50GB, 1.5 TB, 20GiB or 50_000_000.

    Args:
        text: a number and a unit: kB to PB are powers of 1000, KiB to PiB of 1024; none means bytes. The
            case of the unit does not matter, nor do spaces before it, and its B may be left out.
        name: what the size is of, for the message.

    Raises:
        InputError: if it is not of that form, or less than one byte.

    >>> parse_bytes("1.5GB", "disk"), parse_bytes("20GiB", "disk")
    (1500000000, 21474836480)
    """
    match = _SIZE.fullmatch(text.strip())
    if match:
        number, prefix, binary = match.groups()
        power = " kmgtp".index(prefix.lower()) if prefix else 0
        size = int(Decimal(number.replace("_", "")) * (1024 if binary else 1000) ** power)
        if size > 0:
            return size
    raise InputError(f"`{name}` must be a size in bytes such as 50GB, 1.5TB or 20GiB, got {text!r}.")
