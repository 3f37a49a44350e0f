"""Text from tokens that arrive in pieces, never to be taken back."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence


_CONTEXT = 6  # tokens kept before the unread ones: a token's text may depend on its neighbours
_UNKNOWN = "\ufffd"  # stands for bytes that are no character (yet)
_LONGEST_CHARACTER = 4  # bytes


@dataclasses.dataclass
class Detokenizer:
    """An output's text so far.

    Attributes:
      decode: text of token ids.
      stops: texts that will end the output; a beginning of one at the end of the text is held back.
      tokens: all tokens so far.
      anchor: only tokens from here on are decoded again.
      read: characters of their text already taken.
      given: text given out.
      held: text taken but not given out: it may be the beginning of a stop text.
      complete: all tokens' text is given out; nothing is held back.
    """

    decode: Callable[[Sequence[int]], str]
    stops: tuple[str, ...] = ()
    tokens: list[int] = dataclasses.field(default_factory=list)
    anchor: int = 0
    read: int = 0
    given: str = ""
    held: str = ""
    complete: bool = True


def push(state: Detokenizer, tokens: Sequence[int]) -> str:
    """Takes tokens; gives the text that is now certain, which follows what was given before.

    An incomplete character at the end is held back, and so is what may be the beginning of a stop text.
    """
    state.tokens.extend(tokens)
    text = state.decode(state.tokens[state.anchor :])
    certain = len(text) - _doubtful(text)
    if certain > state.read:
        state.held += text[state.read : certain]
        state.read = certain
    if certain == len(text):
        _move_anchor(state)
    hold = longest_beginning(state.held, state.stops)
    new, state.held = state.held[: len(state.held) - hold], state.held[len(state.held) - hold :]
    state.given += new
    state.complete = certain == len(text) and not hold
    return new


def flush(state: Detokenizer) -> str:
    """The rest of the text, as it stands."""
    rest = state.held + state.decode(state.tokens[state.anchor :])[state.read :]
    state.given, state.held, state.anchor, state.read = state.given + rest, "", len(state.tokens), 0
    return rest


def longest_beginning(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of ``text`` that is a beginning of one of ``stops``."""
    for length in range(min(len(text), max(map(len, stops), default=1) - 1), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0


def _doubtful(text: str) -> int:
    """Characters at the end that further bytes may turn into others."""
    unknown = len(text) - len(text.rstrip(_UNKNOWN))
    return min(unknown, _LONGEST_CHARACTER - 1)


def _move_anchor(state: Detokenizer) -> None:
    """All text is taken: forget old tokens, keeping some that have text as context."""
    anchor = len(state.tokens) - _CONTEXT
    if anchor > state.anchor + _CONTEXT:
        context = state.decode(state.tokens[anchor:])
        if context.strip(_UNKNOWN):
            state.anchor, state.read = anchor, len(context)
