"""Models and servers shared by the tests of serving."""

from __future__ import annotations

import contextlib
import pathlib
from collections.abc import Callable, Iterator

import pytest
import running
from fixtures import compiled, model
from running import SMALL


__all__ = ["compiled", "model"]


@pytest.fixture(scope="session")
def server_of(model: pathlib.Path, compiled: pathlib.Path) -> Iterator[Callable[..., running.Server]]:
    """``server_of("--option", ...)``: a server of the tiny model; one for the session for each choice of options."""
    servers: dict[tuple[str, ...], running.Server] = {}
    with contextlib.ExitStack() as stack:

        def start(*options: str) -> running.Server:
            if options not in servers:
                servers[options] = stack.enter_context(running.serving(model, *SMALL, *options, cache=compiled))
            return servers[options]

        yield start


@pytest.fixture
def server(server_of: Callable[..., running.Server]) -> running.Server:
    """The server with default settings."""
    return server_of()
