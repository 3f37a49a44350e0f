"""Ends that the host sees: stop texts and the repetition guard. Only tokens that can no longer change are looked at."""

from __future__ import annotations

from typing import NamedTuple

from diffulex_jax.engine.request import Tracked
from diffulex_jax.engine.tokenizer import Tokenizer


class Cut(NamedTuple):
    """Where an output ends: why, how many tokens stay, and its text (None: the text of those tokens)."""

    reason: str
    length: int
    text: str | None = None


def find_cut(request: Tracked, tokenizer: Tokenizer | None) -> Cut | None:
    """The first end among the request's settled tokens; costs only what is new since the last call."""
    begin, request.checked = request.checked, len(request.tokens)
    cuts = [_repetition(request, begin), _stop_text(request, begin, tokenizer)]
    return min((cut for cut in cuts if cut is not None), key=lambda cut: cut.length, default=None)


def _repetition(request: Tracked, begin: int) -> Cut | None:
    most, tokens = request.params.max_repetition_run, request.tokens
    if most is None:
        return None
    for i in range(begin, len(tokens)):
        request.run = request.run + 1 if i and tokens[i] == tokens[i - 1] else 1
        if request.run > most:
            return Cut("repetition", i)
    return None


def _stop_text(request: Tracked, begin: int, tokenizer: Tokenizer | None) -> Cut | None:
    stops, tokens = request.params.stop, request.tokens
    if not stops or tokenizer is None or begin == len(tokens):
        return None
    # A stop text may have begun in tokens seen before; a token is at least a byte of it.
    first = max(0, begin - max(len(stop.encode()) for stop in stops) - 4)
    if not any(stop in tokenizer.decode(tokens[first:]) for stop in stops):
        return None
    for end in range(begin + 1, len(tokens) + 1):
        text = tokenizer.decode(tokens[:end])
        found = [at for stop in stops if (at := text.find(stop)) >= 0]
        if found:
            kept = text[: min(found)]
            length = max(n for n in range(end) if kept.startswith(tokenizer.decode(tokens[:n])))
            return Cut("stop", length, kept)
    return None
