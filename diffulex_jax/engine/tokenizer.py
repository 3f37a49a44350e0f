"""The model's tokenizer, loaded only when text is used."""

from __future__ import annotations

import functools
import itertools
import json
import os
import pathlib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from diffulex_jax.engine import messages as conversation
from diffulex_jax.engine import pieces
from diffulex_jax.engine.pieces import Piece, Reader


# What tokenizers were kept in before tokenizer.json; transformers turns them into one.
_OLDER = ("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model")


class Part(NamedTuple):
    """A part of a prompt: a stretch of ``text``, or the spelling of one ``special`` token."""

    text: str
    special: bool


class Tokenizer:
    """The tokenizer of a Hugging Face directory. ``transformers`` reads it on first use. Any number of threads may use it."""

    def __init__(self, path: pathlib.Path):
        self._path = path

    @classmethod
    def load(cls, path: pathlib.Path) -> Tokenizer | None:
        """The tokenizer of a model directory; None where there is none.

        Raises:
          ValueError: where there is one that cannot be read.
        """
        tokenizer = cls(path)
        if (path / "tokenizer.json").is_file():
            return tokenizer
        if not any((path / name).is_file() for name in _OLDER):
            return None
        _ = tokenizer._tokenizer  # what must be converted may fail: now, not at the first text
        return tokenizer

    def __getstate__(self) -> dict[str, Any]:
        return {"_path": self._path}  # cheap to send; loaded again where it is used

    @functools.cached_property
    def _tokenizer(self) -> Any:
        # Imported late: half a second, and not needed for token ids. Quietly: that torch or ipywidgets are missing is no news here.
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import transformers

        if (self._path / "tokenizer.json").is_file():
            read: Any = transformers.PreTrainedTokenizerFast
        else:
            read = transformers.AutoTokenizer
        try:
            found = read.from_pretrained(self._path, local_files_only=True, trust_remote_code=False)
            if not hasattr(found, "backend_tokenizer"):
                raise ValueError(f"{type(found).__name__} has no fast tokenizer")
        except Exception as error:  # whatever the library trips over in a foreign file
            files = ", ".join(name for name in ("tokenizer.json", *_OLDER) if (self._path / name).is_file())
            remedy = (
                ""
                if "tokenizer.json" in files
                else "; save the tokenizer as tokenizer.json, or name its tokenizer_class in tokenizer_config.json"
            )
            raise ValueError(f"{self._path}: no tokenizer could be made of {files}{remedy}: {error}") from error
        return found

    @functools.cached_property
    def _backend(self) -> Any:
        # Not the wrapper around it, which sets it up anew for every call: threads would disturb each other.
        backend = self._tokenizer.backend_tokenizer
        backend.no_truncation()
        backend.no_padding()
        return backend

    @functools.cached_property
    def longest_token(self) -> int:
        """Characters of the longest entry of the vocabulary: no token stands for more of a text."""
        return max(map(len, self._tokenizer.get_vocab()))

    def encode(self, text: str) -> list[int]:
        """Token ids of a raw prompt, as it stands: special tokens in it are special tokens. BOS where the tokenizer puts it, once.

        Raises:
          ValueError: for text that is no UTF-8.
        """
        conversation.check_text("the prompt", text)
        ids = self._backend.encode(text).ids
        if (
            ids[:1] == ids[1:2]
            and len(ids) > len(plain := self._backend.encode(text, add_special_tokens=False).ids)
            and plain[:1] == ids[:1]
        ):
            del ids[0]  # the text begins with the BOS that the tokenizer puts before it
        return ids

    def encode_more(self, text: str) -> list[int]:
        """Token ids of text that follows other text: without what the tokenizer puts at the beginning.

        Raises:
          ValueError: for text that is no UTF-8.
        """
        conversation.check_text("the text", text)
        return self._backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out; U+FFFD for what is no UTF-8."""
        ids = [int(id_) for id_ in ids]
        if self._bytes_of_ids:
            ids = self._with_valid_bytes(ids)
        return self._backend.decode(ids, skip_special_tokens=True)

    def spelled(self, ids: Sequence[int]) -> list[Part]:
        """The text of a prompt as the model reads it: special tokens, such as a chat's roles, are parts of their own."""
        found: list[Part] = []
        for special, group in itertools.groupby(map(int, ids), self._is_special):
            part = list(group)
            if special:
                found += [Part(self._added[id_].content, True) for id_ in part]
            else:
                found.append(Part(self._text_behind(part) if found else self.decode(part), False))
        return found

    def pieces(self, ids: Sequence[int]) -> list[Piece]:
        """What each of an output's tokens, from the first on, adds to its text."""
        reader = self.reader()
        found = [self.take(reader, id_) for id_ in ids]
        if found and (end := pieces.rest(reader)):
            found[-1] = Piece(found[-1].text + end, found[-1].bytes)
        return found

    def reader(self) -> Reader:
        """Reads an output whose tokens arrive one after another, by :meth:`take`."""
        return Reader(self.decode)

    def take(self, reader: Reader, id_: int) -> Piece:
        """What the next token adds to the text; what is held back comes with a later one, or by ``pieces.rest``."""
        return pieces.take(reader, id_, own_bytes=self._own_bytes)

    def piece(self, id_: int) -> str:
        """A token's text in the middle of a text of which nothing is known; U+FFFD for a part of a character."""
        return self._piece(id_)

    @functools.cached_property
    def _piece(self) -> Any:
        return functools.lru_cache(maxsize=2**16)(lambda id_: self._text_behind([id_]))

    def _text_behind(self, ids: Sequence[int]) -> str:
        """Text of token ids behind other text: a decoder may take a space off the beginning of all."""
        before, text = self._word
        return self.decode([*before, *ids])[len(text) :]

    @functools.cached_property
    def _word(self) -> tuple[list[int], str]:
        ids = self._backend.encode("a", add_special_tokens=False).ids
        return ids, self.decode(ids)

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """Token ids of a conversation, ready for the answer.

        Contents are plain text: no special token comes of what they hold. ``messages.normalize`` says which forms they may have.

        Raises:
          ValueError: where the tokenizer has no chat template, or the template refuses the messages.
        """
        template = self.chat_template
        if template is None:
            raise ValueError(f"the tokenizer in {self._path} has no chat template")
        plain = conversation.normalize(messages)
        for message in plain:
            if message["role"] == "developer" and "developer" not in template:
                message["role"] = "system"  # OpenAI's newer name for it
        harmless = self._shield.finds_nothing(plain)
        try:
            given = plain if harmless else self._shield.mark(plain)
            rendered = self._tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program of whoever made the model
            raise ValueError(f"the chat template refuses the messages: {error}") from error
        return self._backend.encode(rendered, add_special_tokens=False).ids if harmless else self._shield.encode(rendered)

    def render(self, messages: Sequence[Mapping[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """The text that the chat template makes of a conversation. Special tokens that messages hold are special in it.

        Raises:
          ValueError: where the tokenizer has no chat template.
        """
        if self.chat_template is None:
            raise ValueError(f"the tokenizer in {self._path} has no chat template")
        return self._tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=add_generation_prompt)

    @property
    def chat_template(self) -> str | None:
        """The chat template; of several the default one; None where there is none."""
        templates = self._tokenizer.chat_template
        return (templates.get("default") if isinstance(templates, dict) else templates) or None

    @functools.cached_property
    def _shield(self) -> Any:
        from diffulex_jax.engine.shield import Shield  # late, with the library it needs

        config = self._path / "config.json"
        settings = json.loads(config.read_text(encoding="utf-8-sig")) if config.is_file() else {}
        values = [value for key, value in settings.items() if key.endswith("_token_id")]
        named = {id_ for value in values for id_ in (value if isinstance(value, list) else [value]) if isinstance(id_, int)}
        template = self.chat_template or ""
        return Shield(
            self._backend,
            {
                token.content
                for id_, token in self._added.items()
                if token.special or id_ in named or (token.content in template and not token.content.isspace())
            },
        )

    def _is_special(self, id_: int) -> bool:
        return id_ in self._added and self._added[id_].special

    def _own_bytes(self, id_: int) -> bytes | None:
        """The bytes of a token that stands for bytes; None where its text tells."""
        if id_ in self._bytes_of_ids:
            return bytes([self._bytes_of_ids[id_]])
        token = self._backend.id_to_token(id_)
        if token is None:
            return b""
        if '"ByteLevel"' not in self._decoder or id_ in self._added or any(character not in _STAND_INS for character in token):
            return None
        return bytes(_STAND_INS[character] for character in token)

    def _with_valid_bytes(self, ids: list[int]) -> list[int]:
        """The same text, with what is no UTF-8 among byte tokens spelled as U+FFFD.

        The decoder itself makes U+FFFD of all neighbours of a byte that fits nowhere: text that was there would be taken back.
        """
        shown = (id_ for id_ in ids if not self._is_special(id_))
        valid: list[int] = []
        for is_bytes, run in itertools.groupby(shown, self._bytes_of_ids.__contains__):
            if is_bytes:
                text = bytes(self._bytes_of_ids[id_] for id_ in run).decode(errors="replace")
                valid += [self._ids_of_bytes[byte] for byte in text.encode()]
            else:
                valid += run
        return valid

    @functools.cached_property
    def _bytes_of_ids(self) -> dict[int, int]:
        """The tokens ``<0x00>`` to ``<0xFF>`` of a tokenizer that falls back on bytes."""
        if '"ByteFallback"' not in self._decoder:
            return {}
        found = {self._backend.token_to_id(f"<0x{byte:02X}>"): byte for byte in range(256)}
        return {} if None in found else found

    @functools.cached_property
    def _ids_of_bytes(self) -> dict[int, int]:
        return {byte: id_ for id_, byte in self._bytes_of_ids.items()}

    @functools.cached_property
    def _added(self) -> dict[int, Any]:
        return self._backend.get_added_tokens_decoder()

    @functools.cached_property
    def _decoder(self) -> str:
        """Its part of tokenizer.json."""
        decoder = self._backend.decoder
        return "" if decoder is None else bytes(decoder.__getstate__()).decode()


def _byte_table() -> dict[str, int]:
    """The printable stand-in of each byte in byte-level vocabularies -> the byte (GPT-2's table)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


_STAND_INS = _byte_table()
