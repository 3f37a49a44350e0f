"""A line on the terminal while a model is loaded and compiled, if that takes long."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator


PATIENCE_SECONDS = 2.0
_REFRESH_SECONDS = 0.2


@contextlib.contextmanager
def shown(doing: str = "importing") -> Iterator[None]:
    """Shows on stderr what an engine that is built in the ``with`` does, from :data:`PATIENCE_SECONDS` on; only on a terminal."""
    if not sys.stderr.isatty():
        yield
        return
    from diffulex_jax.engine import startup

    said, done = [doing], threading.Event()
    thread = threading.Thread(target=_draw, args=(said, done), name="progress", daemon=True)
    thread.start()
    try:
        with startup.told_to(lambda stage, what: said.append(f"{stage} {what}")):
            yield
    finally:
        done.set()
        thread.join()


def _draw(said: list[str], done: threading.Event) -> None:
    if done.wait(PATIENCE_SECONDS):
        return
    from tqdm import tqdm

    with tqdm(bar_format="{desc} {elapsed}", leave=False, file=sys.stderr) as line:
        while not done.wait(_REFRESH_SECONDS):
            line.set_description_str(said[-1])
