"""Text from tokens that arrive in pieces, never to be taken back, and never the beginning of a stop text."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from diffulex_jax.engine.pieces import Reader, read, rest


@dataclasses.dataclass
class Detokenizer(Reader):
    """An output's text so far.

    Attributes:
      stops: texts that will end the output; a beginning of one at the end of the text is held back.
      given: text given out.
      held: text read but not given out: it may be the beginning of a stop text.
    """

    stops: tuple[str, ...] = ()
    given: str = ""
    held: str = ""

    @property
    def complete(self) -> bool:
        """All tokens' text is given out; nothing is held back."""
        return self.caught_up and not self.held


def push(state: Detokenizer, tokens: Sequence[int]) -> str:
    """Takes tokens; gives the text that is now certain, which follows what was given before.

    An incomplete character at the end is held back, and so is what may be the beginning of a stop text.
    """
    state.held += read(state, tokens)
    hold = longest_beginning(state.held, state.stops)
    new, state.held = state.held[: len(state.held) - hold], state.held[len(state.held) - hold :]
    state.given += new
    return new


def flush(state: Detokenizer) -> str:
    """The rest of the text, as it stands."""
    remaining = state.held + rest(state)
    state.given, state.held = state.given + remaining, ""
    return remaining


def longest_beginning(text: str, stops: Sequence[str]) -> int:
    """Length of the longest end of ``text`` that is a beginning of one of ``stops``."""
    for length in range(min(len(text), max(map(len, stops), default=1) - 1), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
