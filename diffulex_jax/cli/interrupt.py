"""Ctrl-C: the process ends at once with exit code 130, whatever it does.

Python calls a signal's handler between two bytecodes of the main thread, which may be minutes away while XLA compiles. And an
exit in good order destroys what XLA's threads are still using, which ends in a segmentation fault. So a thread waits for the
byte that Python's C handler writes at once, and leaves without tearing anything down.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import types
from typing import NoReturn


EXIT_CODE = 128 + signal.SIGINT


def watch() -> None:
    """Makes SIGINT end this process with :data:`EXIT_CODE`. Call it in the main thread; again does nothing."""
    if signal.getsignal(signal.SIGINT) is _leave:
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    signal.signal(signal.SIGINT, _leave)
    signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    threading.Thread(target=_wait, args=(reading,), name="interrupt", daemon=True).start()


def leave_to_loop() -> None:
    """Lets a server's event loop decide what SIGINT means, once it has set a handler of its own."""
    signal.set_wakeup_fd(-1)


def leave(code: int) -> NoReturn:
    """Ends the process with an exit code, without tearing down what threads may still be using."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _wait(reading: int) -> None:
    while received := os.read(reading, 64):
        if signal.SIGINT in received:
            _leave(signal.SIGINT, None)


def _leave(number: int, frame: types.FrameType | None) -> None:
    # What was answered is flushed line by line. Locks may be held, so nothing but the system is called.
    if os.isatty(2):
        os.write(2, b"\n")
    os._exit(EXIT_CODE)
