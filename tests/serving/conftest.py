"""Models and servers shared by the tests of serving."""

from __future__ import annotations

import contextlib
import functools
import pathlib
from collections.abc import Callable, Iterator

import pytest
import running
from fixtures import compiled, model
from running import SMALL


__all__ = ["compiled", "model"]


@pytest.fixture(scope="session")
def default_server(model: pathlib.Path, compiled: pathlib.Path) -> Iterator[Callable[[], running.Server]]:
    """``default_server()``: the server with default settings, started when first asked for; one for the whole session."""
    with contextlib.ExitStack() as stack:
        yield functools.cache(lambda: stack.enter_context(running.serving(model, *SMALL, cache=compiled)))


@pytest.fixture(scope="module")
def server_of(
    default_server: Callable[[], running.Server], model: pathlib.Path, compiled: pathlib.Path
) -> Iterator[Callable[..., running.Server]]:
    """``server_of("--option", ...)``: a server of the tiny model; one for the tests of a file for each choice of options.

    With options it is a single process, which starts sooner; the one with default settings has its engine in a process of its own.
    """
    with contextlib.ExitStack() as stack:

        @functools.cache
        def start(*options: str) -> running.Server:
            if not options:
                return default_server()
            return stack.enter_context(running.serving(model, *SMALL, "--isolation", "thread", *options, cache=compiled))

        yield start


@pytest.fixture
def server(server_of: Callable[..., running.Server]) -> running.Server:
    """The server with default settings."""
    return server_of()
