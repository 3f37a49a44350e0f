"""How the threads of a process share an engine: one at a time, in turn, and never left half done."""

from __future__ import annotations

import contextlib
import signal
import threading
import types
from collections.abc import Iterator


class Turns:
    """A lock for work that must not be broken off.

    Threads that ask for it in a loop take turns: who waits goes before who has just had it. Ctrl-C waits for the end of the block.
    """

    def __init__(self) -> None:
        self._next, self._lock = threading.Lock(), threading.Lock()

    @contextlib.contextmanager
    def mine(self) -> Iterator[None]:
        """Holds the lock. It cannot be taken twice."""
        with _interrupts_wait():
            with self._next:  # whoever waits here is next: a thread that comes back at once queues behind it
                self._lock.acquire()
            try:
                yield
            finally:
                self._lock.release()


@contextlib.contextmanager
def _interrupts_wait() -> Iterator[None]:
    """Puts SIGINT off until the end of the block; a second one goes through. Python runs its handler in the main thread alone."""
    usual = signal.getsignal(signal.SIGINT) if threading.current_thread() is threading.main_thread() else None
    if not callable(usual):  # ignored, or left to the system
        yield
        return
    handle = usual
    caught: list[int] = []

    def put_off(number: int, frame: types.FrameType | None) -> None:
        if caught:
            handle(number, frame)
        caught.append(number)

    signal.signal(signal.SIGINT, put_off)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handle)
        if caught:
            handle(caught[0], None)
