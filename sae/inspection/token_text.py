"""How tokens are shown to people."""

from __future__ import annotations

import json

from transformers import PreTrainedTokenizerBase


class TokenText:
    """Shows tokens as quoted strings, leading spaces and newlines visible."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        # A token alone loses its leading space in some tokenizers; behind another token it keeps it.
        self._anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1]
        self._anchor_length = len(self._decode([self._anchor]))

    def __call__(self, token_id: int) -> str:
        """The token in quotes, e.g. `" the"` or `"\\n"`."""
        text = self._decode([self._anchor, token_id])[self._anchor_length :]
        return json.dumps(text or self._tokenizer.convert_ids_to_tokens(token_id), ensure_ascii=False)

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, clean_up_tokenization_spaces=False))
