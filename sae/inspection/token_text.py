"""How tokens are shown to people."""

from __future__ import annotations

import functools
import re

from transformers import PreTrainedTokenizerBase

from sae.errors import InputError

_ESCAPES = {'"': '\\"', "\\": "\\\\", "\n": "\\n", "\t": "\\t", "\r": "\\r"}


class TokenText:
    r"""Shows tokens as quoted strings: leading spaces and newlines visible, nothing that acts.

    What does not print (control characters, marks that change the direction of writing, invisible
    spaces) is escaped, and so are the bytes of tokens that are not whole characters: `"\n"`, `"\u202e"`,
    `"\xe2\x80"`. Terminals and web pages can show the result as it is.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        # A token alone loses its leading space in some tokenizers; behind another token it keeps it.
        self._anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1]
        self._anchor_length = len(self._decode([self._anchor]))
        self._shown = functools.lru_cache(maxsize=None)(self._show)

    def __call__(self, token_id: int) -> str:
        """The token in quotes, e.g. `" the"`."""
        return self._shown(token_id)

    def _show(self, token_id: int) -> str:
        text = self._decode([self._anchor, token_id])[self._anchor_length :]
        raw = self._tokenizer.convert_ids_to_tokens(token_id)
        if "\ufffd" in text and isinstance(raw, str):
            return f'"{_escape_bytes(raw)}"'
        return quoted(text or str(raw))

    def token_id(self, text: str) -> int:
        """The token that is shown as `text` (without the quotes).

        Raises:
            InputError: if no single token is; says how the tokenizer splits it.
        """
        ids = [
            self._tokenizer(before + text, add_special_tokens=False)["input_ids"]
            for before in ("", "a", "\n")
        ]
        for candidate in [
            self._tokenizer.convert_tokens_to_ids(text),
            *(split[-1] for split in ids if split),
        ]:
            if isinstance(candidate, int) and self(candidate) in (quoted(text), f'"{text}"'):
                return candidate
        pieces = " ".join(map(self, ids[0])) or "nothing"
        raise InputError(
            f"`token` must be one token of the model's vocabulary, got {quoted(text)}, which is {pieces};"
            " give one of these, spaces included."
        )

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def quoted(text: str) -> str:
    """The text in double quotes, with everything that does not print escaped."""
    return '"' + "".join(_ESCAPES.get(c) or (c if c.isprintable() else _code(c)) for c in text) + '"'


def _code(character: str) -> str:
    number = ord(character)
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def _escape_bytes(raw: str) -> str:
    """A token that is not whole characters, its odd bytes written as \\xNN."""
    fallback = re.fullmatch(r"<0x([0-9A-F]{2})>", raw)
    if fallback:
        return f"\\x{fallback[1].lower()}"
    table = _byte_alphabet()
    if not all(character in table for character in raw):
        return quoted(raw)[1:-1]
    text = bytes(table[character] for character in raw).decode("utf-8", "surrogateescape")
    return "".join(
        f"\\x{ord(c) - 0xDC00:02x}" if 0xDC80 <= ord(c) <= 0xDCFF else quoted(c)[1:-1] for c in text
    )


@functools.cache
def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level tokenizers write bytes as: printable ones stand for themselves."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}
