"""What an engine is doing while it starts, told to whoever shows it: a log, a progress line, ``/health``."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Literal


Stage = Literal["loading", "compiling"]
Listener = Callable[[Stage, str], None]

_listener: contextvars.ContextVar[Listener | None] = contextvars.ContextVar("listener", default=None)


@contextlib.contextmanager
def told_to(listener: Listener) -> Iterator[None]:
    """Calls ``listener(stage, what)`` for every stage that begins in this thread for the time of a ``with``."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def is_told() -> bool:
    """Whether somebody shows what an engine does that starts in this thread."""
    return _listener.get() is not None


def announce(stage: Stage, what: str) -> None:
    """Says that a stage begins: loading a model, or compiling a strategy's programs."""
    if (listener := _listener.get()) is not None:
        listener(stage, what)
