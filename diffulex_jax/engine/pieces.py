"""Text of tokens that arrive one after another: what each adds, never to be taken back.

The one definition of a token's text is ``decode(before + [token])`` without ``decode(before)``. Decoding a token alone is something
else: it loses the space of a word piece, and a piece of a character becomes U+FFFD.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple


_CONTEXT = 6  # tokens kept before the unread ones: a token's text may depend on its neighbours
_UNKNOWN = "\ufffd"  # stands for bytes that are no character (yet)
_LONGEST_CHARACTER = 4  # bytes

Decode = Callable[[Sequence[int]], str]


class Piece(NamedTuple):
    """What a token adds to the text.

    Attributes:
      text: empty where the token ends within a character, whose text comes with the token that completes it. Joined, the pieces are
        the text.
      bytes: the token's own bytes, also of a part of a character. Joined, they are the text's.
    """

    text: str
    bytes: bytes


@dataclasses.dataclass
class Reader:
    """Reads the text of tokens.

    Attributes:
      decode: text of token ids.
      tokens: all tokens so far.
      anchor: only tokens from here on are decoded again.
      taken: characters of their text already read.
      caught_up: the text of all tokens is read; nothing is held back.
    """

    decode: Decode
    tokens: list[int] = dataclasses.field(default_factory=list, kw_only=True)
    anchor: int = dataclasses.field(default=0, kw_only=True)
    taken: int = dataclasses.field(default=0, kw_only=True)
    caught_up: bool = dataclasses.field(default=True, kw_only=True)


def read(reader: Reader, tokens: Iterable[int]) -> str:
    """Takes tokens and returns the text that is now certain; an incomplete character at the end is held back."""
    reader.tokens.extend(tokens)
    text = reader.decode(reader.tokens[reader.anchor :])
    certain = max(len(text) - _doubtful(text), reader.taken)
    new, reader.taken = text[reader.taken : certain], certain
    reader.caught_up = certain >= len(text)
    if reader.caught_up:
        _move_anchor(reader)
    return new


def rest(reader: Reader) -> str:
    """Returns the text that was held back, as it stands."""
    text = reader.decode(reader.tokens[reader.anchor :])[reader.taken :]
    reader.anchor, reader.taken, reader.caught_up = len(reader.tokens), 0, True
    return text


def take(reader: Reader, token: int, *, own_bytes: Callable[[int], bytes | None]) -> Piece:
    """Takes one token and returns what it adds.

    Args:
      reader: what came before.
      token: its id.
      own_bytes: the bytes of a token that stands for bytes; None where only its text tells.
    """
    held = not reader.caught_up
    text, known = read(reader, [token]), own_bytes(token)
    if known is None:  # behind half a character the text begins with what becomes of that
        known = (text.lstrip(_UNKNOWN) if held else text).encode()
    return Piece(text, known)


def _doubtful(text: str) -> int:
    """Characters at the end that further bytes may turn into others."""
    unknown = len(text) - len(text.rstrip(_UNKNOWN))
    return min(unknown, _LONGEST_CHARACTER - 1)


def _move_anchor(reader: Reader) -> None:
    """All text is read: forget old tokens, keeping some that have text as context."""
    anchor = len(reader.tokens) - _CONTEXT
    if anchor > reader.anchor + _CONTEXT:
        context = reader.decode(reader.tokens[anchor:])
        if context.strip(_UNKNOWN):
            reader.anchor, reader.taken = anchor, len(context)
