"""Work that nobody waits for: a few threads do it in the order in which it came, and end when nothing is left.

A process that ends does what was begun, and drops the rest: a compiler cannot be stopped halfway.
"""

from __future__ import annotations

import atexit
import collections
import os
import threading
from collections.abc import Callable


THREAD = "background"  # name of its threads

_MOST_AT_ONCE = 4
_tasks: collections.deque[Callable[[], None]] = collections.deque()
_threads: set[threading.Thread] = set()
_lock = threading.Lock()


def do_later(task: Callable[[], None]) -> None:
    """Has a thread of the background call ``task``, which raises nothing."""
    with _lock:
        _tasks.append(task)
        if len(_threads) < _at_once():
            # Not joined before what is registered below: a thread of a pool would do all that is left first.
            thread = threading.Thread(target=_work, name=THREAD, daemon=True)
            _threads.add(thread)
            thread.start()


def is_here() -> bool:
    """Whether this is a thread of the background."""
    return threading.current_thread() in _threads


def _at_once() -> int:
    """A quarter of the processors: the others are for what somebody waits for."""
    return max(1, min(_MOST_AT_ONCE, (os.cpu_count() or 1) // 4))


def _work() -> None:
    while True:
        with _lock:
            if not _tasks:
                _threads.discard(threading.current_thread())
                return
            task = _tasks.popleft()
        task()
        del task  # and what it holds, while this waits for the lock


def _end() -> None:
    with _lock:
        _tasks.clear()
        working = list(_threads)
    for thread in working:
        thread.join()


atexit.register(_end)
