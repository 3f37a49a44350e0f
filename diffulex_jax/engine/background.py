"""Work that nobody waits for: a few threads do it in the order in which it came, and end when nothing is left.

A process that ends does what was begun, and drops the rest: a compiler cannot be stopped halfway.
"""

from __future__ import annotations

import atexit
import collections
import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator


THREAD = "background"  # name of its threads

_MOST_AT_ONCE = 4
_SWITCH_SECONDS = 0.0005  # a thread that wants to go on has Python's lock so soon; Python's own 5 ms, again and again, would add up

_tasks: collections.deque[Callable[[], None]] = collections.deque()
_threads: set[threading.Thread] = set()
_lock = threading.Lock()
_holding = 0
_usual_switch = sys.getswitchinterval()


def do_later(task: Callable[[], None]) -> None:
    """Has a thread of the background call ``task``, which raises nothing."""
    with _lock:
        _tasks.append(task)
        _start()


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Begins no task of the background for the time of a ``with``: something is done that is waited for."""
    global _holding
    with _lock:
        _holding += 1
    try:
        yield
    finally:
        with _lock:
            _holding -= 1
            _start()


def is_here() -> bool:
    """Whether this is a thread of the background."""
    return threading.current_thread() in _threads


def _start() -> None:
    """Starts the threads that are missing, where this has the lock."""
    global _usual_switch
    for _ in range(0 if _holding else min(_at_once() - len(_threads), len(_tasks))):
        if not _threads:
            _usual_switch = sys.getswitchinterval()
            sys.setswitchinterval(min(_usual_switch, _SWITCH_SECONDS))
        # Python joins other threads before it calls what is registered below, and those of a pool would do all that is left first.
        thread = threading.Thread(target=_work, name=THREAD, daemon=True)
        _threads.add(thread)
        thread.start()


def _at_once() -> int:
    """A quarter of the processors: the others are for what somebody waits for."""
    return max(1, min(_MOST_AT_ONCE, (os.cpu_count() or 1) // 4))


def _work() -> None:
    while True:
        with _lock:
            if _holding or not _tasks:
                _threads.discard(threading.current_thread())
                if not _threads:
                    sys.setswitchinterval(_usual_switch)
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
