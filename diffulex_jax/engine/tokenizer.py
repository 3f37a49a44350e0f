"""The model's tokenizer, loaded only when text is used."""

from __future__ import annotations

import functools
import os
import pathlib
from collections.abc import Sequence
from typing import Any


class Tokenizer:
    """A Hugging Face directory with a ``tokenizer.json``. ``transformers`` reads it on first use."""

    def __init__(self, path: pathlib.Path):
        self._path = path

    @classmethod
    def load(cls, path: pathlib.Path) -> Tokenizer | None:
        """The tokenizer of a model directory; None where there is none."""
        return cls(path) if (path / "tokenizer.json").is_file() else None

    @functools.cached_property
    def _tokenizer(self) -> Any:
        # Imported late: half a second, and not needed for token ids. Quietly: that torch is missing is no news here.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        import transformers

        return transformers.PreTrainedTokenizerFast.from_pretrained(self._path)

    @functools.cached_property
    def longest_token(self) -> int:
        """Characters of the longest entry of the vocabulary: no token stands for more of a text."""
        return max(map(len, self._tokenizer.get_vocab()))

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, as it stands."""
        return self._tokenizer.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return self._tokenizer.decode(ids, skip_special_tokens=True)

    def apply_chat_template(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation, ready for the answer.

        Raises:
          ValueError: where the tokenizer has no chat template.
        """
        if not self._tokenizer.chat_template:
            raise ValueError(f"the tokenizer in {self._path} has no chat template")
        return self._tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, return_dict=False)
